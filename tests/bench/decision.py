"""CPU time of the router's decisions for one photo, in microseconds. The promise is 0.1 ms a photo.

    python -m tests.bench.decision [--json FILE]

The photo is hard, so that no exit answers; four budgets and a latency target are set.

    us_per_photo   from before the head until the photo is sent or the last exit has run, on the link where that is most
    us_all_steps   every step up to the last exit, though the router would have sent the photo before
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import Goal
from isthmus.edge_agent.radio import Radio
from isthmus.edge_agent.spending import Budgets
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.request import Overrides, RequestState, resolve_request
from isthmus.edge_agent.vision.router import Router
from isthmus.models.bundle.files import read_manifest
from isthmus.models.bundle.installed import find
from isthmus.models.vision.manifest import Manifest

BUNDLES = ("elpv", "fashion", "photos")
PHOTOS, ROUNDS = 200, 5
LINK = LinkEstimate(rtt_s=0.05, bytes_per_s=250_000)
LINKS = [LinkEstimate(rtt_s, mbit * 1e6 / 8) for rtt_s in (0.005, 0.05, 0.15) for mbit in (0.01, 0.25, 1, 5, 25, 100)]
BUDGETS = Budgets(bytes_day=1e9, usd_day=1.0, joules_day=1e6, calls_hour=1_000_000)


def measure(name: str, ledger: Ledger) -> dict[str, Any]:
    """The figures of one bundle; and how many steps and ways there are at most."""
    manifest = read_manifest(find(Path(name)), Manifest)
    costs = Costs(manifest, open_profile("lte"))
    exits = [exit_.name for exit_ in manifest.heads["fp32"].exits]
    router = Router(costs, exits, ledger, Radio())
    request = resolve_request(costs.points, manifest, EdgeConfig(Path(name)), None, Overrides())
    goal = Goal("fastest", 0.9, target_s=0.5)
    unsure_K = np.full(len(manifest.tasks[0].labels), 0.5, np.float32)

    def decide(link: LinkEstimate, to_the_end: bool) -> int:
        """All decisions for one photo. Returns how many there were."""
        state = RequestState(request, 1.0)
        for passed in range(len(exits) + 1):
            state.exits = [unsure_K] * passed
            if router.next(state, "auto", goal, link, None).route != "continue" and not to_the_end:
                break
        return passed + 1

    walks = {link: microseconds(partial(decide, link, to_the_end=False)) for link in LINKS}
    worst = max(walks, key=walks.__getitem__)
    return {
        "bundle": name,
        "us_per_photo": round(walks[worst], 1),
        "worst_link": {"rtt_ms": 1000 * worst.rtt_s, "mbit_s": worst.bytes_per_s * 8e-6},
        "worst_steps": decide(worst, to_the_end=False),
        "us_all_steps": round(microseconds(partial(decide, LINK, to_the_end=True)), 1),
        "steps": len(exits) + 1,
        "ways": len(request.points) + 1,
    }


def microseconds(work: Callable[[], object]) -> float:
    """CPU time of one call, the least of several rounds."""
    best_us = float("inf")
    for _ in range(ROUNDS):
        started_s = time.process_time()
        for _ in range(PHOTOS):
            work()
        best_us = min(best_us, 1e6 * (time.process_time() - started_s) / PHOTOS)
    return best_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(BUDGETS.budgets, Path(folder, "ledger.db"))
        rows = [measure(name, ledger) for name in BUNDLES]
        ledger.close()
    for row in rows:
        print(
            "{bundle:<10} {us_per_photo:7.1f} µs a photo in {worst_steps} steps; {us_all_steps:.1f} µs "
            "in all {steps} steps, {ways} ways".format(**row)
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
