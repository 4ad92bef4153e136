"""Two replicas of the cloud service, a core each: photos a second beside one replica's, and what SIGKILL costs.

    throughput    one replica and both in turn, in both orders, messages packed before (`photo_replay`)
    faults        photos from several devices while a replica is killed now and then, and started again (`photo_load`)

The balancer: `haproxy` with the configuration that we ship; `none`: each device lists both replicas, half of them in
either order; `ray`: two of `cloud-service ray`, with one replica and with two. Figures mean something on a machine that
does nothing else; the processes run at a higher priority where that is allowed.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
from PIL import Image

from isthmus.models.messages import Payload
from isthmus.models.vision.bundle import Bundle
from tests.bench.balancer import Haproxy
from tests.bench.photo_load import Load, devices, prepack
from tests.bench.photo_replay import pack, rate
from tests.bench.processes import ROOT, CloudProcess
from tests.bench.ray_cloud import RayProcess

SAMPLE = ROOT / "docs" / "samples" / "cell.png"
PAYLOADS, MESSAGES = 16, 512
DEADLINE_S = 30.0
SETTLE_S = 2.0  # of a measurement, before it counts
QUIET_S = 3.0  # between a replica that serves again and the next kill
PRIORITY = -15

Targets = tuple[str, ...]  # of one device, in order of preference


@dataclass(frozen=True)
class Fleet:
    """Two replicas behind a balancer. `one`, `two`: targets of each device, while one replica serves, or both.

    `kill(n)` ends the nth replica as SIGKILL does, and returns when it serves again.
    """

    one: Callable[[], AbstractContextManager[Sequence[Targets]]]
    two: Callable[[], AbstractContextManager[Sequence[Targets]]]
    kill: Callable[[int], None]


@contextmanager
def replicas(bundle: Bundle, count: int) -> Iterator[list[CloudProcess]]:
    """Cloud services with a core each."""
    with ExitStack() as stack:
        clouds = [CloudProcess(bundle.folder, arguments=("--threads", "1"), cpus=str(core)) for core in range(count)]
        for cloud in clouds:
            stack.callback(cloud.stop)
            cloud.start(wait=False)
        for cloud in clouds:
            cloud.wait_serving()
        yield clouds


def killing(clouds: Sequence[CloudProcess]) -> Callable[[int], None]:
    """Kills and restarts one of `clouds`."""

    def kill(number: int) -> None:
        cloud = clouds[number % len(clouds)]
        cloud.kill()
        cloud.start()

    return kill


@contextmanager
def behind_haproxy(bundle: Bundle, count: int) -> Iterator[Fleet]:
    """Every device has haproxy's address; another haproxy has the first replica alone."""
    with replicas(bundle, 2) as clouds:
        first, second = (cloud.target for cloud in clouds)
        with Haproxy(first, second) as both, Haproxy(first, first) as alone:
            one, two = [(alone.target,)] * count, [(both.target,)] * count
            yield Fleet(lambda: nullcontext(one), lambda: nullcontext(two), killing(clouds))


@contextmanager
def without_balancer(bundle: Bundle, count: int) -> Iterator[Fleet]:
    """Every device lists both replicas."""
    with replicas(bundle, 2) as clouds:
        first, second = (cloud.target for cloud in clouds)
        one, two = [(first,)] * count, list(islice(cycle([(first, second), (second, first)]), count))
        yield Fleet(lambda: nullcontext(one), lambda: nullcontext(two), killing(clouds))


@contextmanager
def on_ray(bundle: Bundle, count: int) -> Iterator[Fleet]:
    """Every device has a service on Ray, which is started for a measurement: an idle cluster computes, too."""
    running: list[RayProcess] = []

    @contextmanager
    def started(replicas: int) -> Iterator[Sequence[Targets]]:
        with RayProcess(bundle.folder, count=replicas) as cloud:
            cloud.pin()
            running[:] = [cloud]
            yield [(cloud.target,)] * count

    yield Fleet(lambda: started(1), lambda: started(2), lambda number: running[0].kill_replica(number))


BALANCERS: dict[str, Callable[[Bundle, int], AbstractContextManager[Fleet]]] = {
    "haproxy": behind_haproxy,
    "none": without_balancer,
    "ray": on_ray,
}


def throughput(
    fleet: Fleet, messages: Sequence[bytes], in_flight: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Photos a second with one replica and with two, a figure a round; odd rounds measure two first.

    As many photos are in flight for each replica in both cases.
    """
    found: dict[str, list[float]] = {"one": [], "two": []}
    for number in range(rounds):
        for name in ("one", "two") if number % 2 == 0 else ("two", "one"):
            with getattr(fleet, name)() as lists:
                targets = [clouds[0] for clouds in lists]
                targets = targets if name == "two" else targets[: (len(targets) + 1) // 2]
                found[name].append(asyncio.run(rate(targets, messages, in_flight, SETTLE_S, seconds)))
            click.echo(f"round {number + 1}: {name} {found[name][-1]:.1f} photos/s")
    return found


def summarise(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over the rounds, and their ratio over all and by order."""

    def ratio(numbers: slice) -> float:
        return round(statistics.median(found["two"][numbers]) / statistics.median(found["one"][numbers]), 3)

    return {
        "one_photos_per_s": [round(value, 2) for value in found["one"]],
        "two_photos_per_s": [round(value, 2) for value in found["two"]],
        "one_median": round(statistics.median(found["one"]), 2),
        "two_median": round(statistics.median(found["two"]), 2),
        "ratio": ratio(slice(None)),
        "ratio_one_first": ratio(slice(0, None, 2)),
        "ratio_two_first": ratio(slice(1, None, 2)) if len(found["one"]) > 1 else None,
    }


def faults(
    bundle: Bundle, fleet: Fleet, payloads: Sequence[Payload], in_flight: int, photos: int, deadline_s: float
) -> dict[str, Any]:
    """Photos while one replica after the other is killed, each when both serve."""
    stop, kills = threading.Event(), list[float]()
    started_s = time.monotonic()

    def kill() -> None:
        while not stop.wait(QUIET_S):
            kills.append(round(time.monotonic() - started_s, 1))
            fleet.kill(len(kills))

    with fleet.two() as targets, devices(bundle, targets, in_flight) as load:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found: Load = load.run(payloads, photos, deadline_s)
        finally:
            stop.set()
            killer.join()
        return {**found.as_dict(), "late_replies": load.late, "kills": len(kills), "killed_at_s": kills}


@click.command()
@click.option("--balancer", type=click.Choice(list(BALANCERS)), default="haproxy", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), default=ROOT / "models" / "zoo" / "elpv")
@click.option("--sample", type=click.Path(path_type=Path), default=SAMPLE, help="Photo of which payloads are made.")
@click.option("--devices", "count", default=8, show_default=True, help="Devices, each with a channel of its own.")
@click.option("--in-flight", default=4, show_default=True, help="Photos that each device has in flight.")
@click.option("--rounds", default=6, show_default=True, help="Measurements of one replica, and of two.")
@click.option("--seconds", default=8.0, show_default=True, help="Length of one measurement.")
@click.option("--photos", default=10_000, show_default=True, help="Photos under SIGKILL; 0 for none.")
@click.option("--json", "figures", type=click.Path(path_type=Path))
def main(
    balancer: str,
    bundle: Path,
    sample: Path,
    count: int,
    in_flight: int,
    rounds: int,
    seconds: float,
    photos: int,
    figures: Path | None,
) -> None:
    """Measure, and write the figures as JSON."""
    opened = Bundle.open(bundle)
    payloads = prepack(opened, Image.open(sample).convert("RGB"), PAYLOADS)
    raise_priority()
    result: dict[str, Any] = {
        "balancer": balancer,
        "bundle": opened.manifest.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "devices": count,
        "in_flight": in_flight,
    }
    with BALANCERS[balancer](opened, count) as fleet:
        if rounds:
            messages = pack(opened, payloads, MESSAGES)
            result["throughput"] = summarise(throughput(fleet, messages, in_flight, rounds, seconds))
        if photos:
            result["faults"] = faults(opened, fleet, payloads, in_flight, photos, DEADLINE_S)
    click.echo(json.dumps(result, indent=1))
    if figures is not None:
        figures.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def raise_priority() -> None:
    """Of this process and those that it starts, where that is allowed: other work then disturbs the figures less."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    except PermissionError:
        click.echo("not allowed to raise the priority: other work on this machine disturbs the figures")


if __name__ == "__main__":
    main()
