"""The audit of exits with a real cloud: what it sends and pays, what lands in the file, and what is made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import Audits
from isthmus.edge_agent.spending import Budgets
from isthmus.edge_agent.vision.audit import Auditor
from isthmus.models.bundle.files import write_bundle
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Manifest
from tests.bench.processes import ROOT, CloudProcess
from tests.contract.test_fork import forked

PHOTOS = 60
NewAgent = Callable[..., EdgeAgent]


@pytest.fixture(scope="module")
def ready_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, whose first exit answers everything."""
    content = json.loads((tiny_bundle.folder / "manifest.json").read_bytes())
    files = {name: (tiny_bundle.folder / name).read_bytes() for name in content.pop("files")}
    content.pop("fingerprint")
    for head in content["heads"].values():
        for threshold in head["thresholds"]:
            threshold.update(confidences=[0.0, 0.0], shares=[1.0, 0.0])
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("ready") / "tiny", content, files, Manifest))


@pytest.fixture(scope="module")
def ready_cloud(ready_bundle: Bundle) -> Iterator[CloudProcess]:
    with CloudProcess(ready_bundle.folder, arguments=("--threads", "1")) as process:
        yield process


@pytest.fixture
def audited(new_agent: NewAgent, ready_bundle: Bundle, ready_cloud: CloudProcess, tmp_path: Path) -> NewAgent:
    def build(**settings: Any) -> EdgeAgent:
        audits = Audits(share=1.0, folder=tmp_path)
        common = {"bundle": ready_bundle.folder, "epsilon": 0.02, "deadline_s": 10.0, "audits": audits}
        return new_agent(ready_cloud.target, **{**common, **settings})

    return build


@pytest.fixture(scope="module")
def photos(ready_bundle: Bundle, ready_cloud: CloudProcess) -> dict[bool, Image.Image]:
    """A photo whose exit answers as the cloud does, and one whose exit does not."""
    found = dict[bool, Image.Image]()
    with (
        EdgeAgent(EdgeConfig(ready_bundle.folder, threads=1, mode="edge")) as edge,
        EdgeAgent(
            EdgeConfig(ready_bundle.folder, (ready_cloud.target,), threads=1, mode="offload", connect_s=10.0)
        ) as cloud,
    ):
        for seed in range(100):
            pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
            photo = Image.fromarray(pixels.repeat(16, axis=0).repeat(16, axis=1))
            found[edge.infer(photo).index == cloud.infer(photo, deadline_s=10.0).index] = photo
            if len(found) == 2:
                return found
    raise AssertionError(f"of 100 random photos all give {list(found)}")


def answer(agent: EdgeAgent, photo: Image.Image, times: int) -> Auditor:
    """Each answered and audited before the next."""
    auditor = agent._auditor
    assert auditor is not None
    for _ in range(times):
        agent.infer(photo)
        auditor.wait()
    return auditor


def recalibrate(bundle: Bundle, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.edge_agent", "recalibrate", "--json", "--bundle", str(bundle.folder)]
    options = ["--epsilon", "0.02", "--audit-folder", str(folder)]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ}
    )


def test_exits_are_audited_in_the_background_and_recalibrated_from_the_file(
    audited: NewAgent, ready_bundle: Bundle, photos: dict[bool, Image.Image], tmp_path: Path
) -> None:
    agent = audited()
    before = agent.ledger.totals.spent
    assert agent.infer(photos[True]).bytes_up == 0, "the answer itself sends nothing"
    auditor = answer(agent, photos[True], PHOTOS - 1)
    assert len(auditor.pairs.pairs(in_alarm=False)) == PHOTOS and not auditor.audit.alarm
    spent = agent.ledger.totals.spent
    assert spent.calls - before.calls == PHOTOS and spent.bytes - before.bytes > PHOTOS * 200
    done = recalibrate(ready_bundle, tmp_path)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)["certificates"][0]
    assert (first["pairs"], first["disagreement"], first["coverage"]) == (PHOTOS, 0.0, 1.0)
    auditor = answer(agent, photos[True], 1)
    assert auditor.audit.in_force is not None
    assert list(auditor.audit.in_force.confidences) == first["level"]["confidences"], "the running agent uses it"


def test_an_alarm_ends_the_exits_answers_here_and_after_a_restart(
    audited: NewAgent, ready_bundle: Bundle, photos: dict[bool, Image.Image], tmp_path: Path
) -> None:
    agent = audited()
    auditor = answer(agent, photos[False], 20)
    assert auditor.audit.alarm and agent.infer(photos[False]).route in ("split", "offload")
    agent.close()
    assert audited().infer(photos[False]).route in ("split", "offload")
    done = recalibrate(ready_bundle, tmp_path)
    assert done.returncode != 0 and "audited pairs since the alarm are too few" in done.stderr


def test_audits_stay_within_the_budget_and_answers_do_not_need_it(
    audited: NewAgent, photos: dict[bool, Image.Image], tmp_path: Path
) -> None:
    """A tenth of 30 calls an hour may be made at once."""
    agent = audited(budgets=Budgets(calls_hour=30), ledger=tmp_path / "ledger.db")
    answers = [agent.infer(photos[True]) for _ in range(12)]
    auditor = answer(agent, photos[True], 1)
    assert {(each.route, each.degraded) for each in answers} == {("exit", False)}
    assert 1 <= len(auditor.pairs.pairs(in_alarm=False)) <= 4


def test_private_photos_are_not_audited(
    audited: NewAgent, ready_cloud: CloudProcess, photos: dict[bool, Image.Image]
) -> None:
    agent = audited()
    served = ready_cloud.metric("requests_total", method="InferStream")
    assert [agent.infer(photos[True], private=True).route for _ in range(10)] == ["exit"] * 10
    assert agent._auditor is not None and agent._auditor.pairs.pairs(in_alarm=False) == []
    assert ready_cloud.metric("requests_total", method="InferStream") == served


def test_a_child_of_a_fork_leaves_the_audit_alone(audited: NewAgent, photos: dict[bool, Image.Image]) -> None:
    agent = audited()
    answer(agent, photos[True], 2)
    assert forked(agent.close) is None
    auditor = answer(agent, photos[True], 2)
    assert len(auditor.pairs.pairs(in_alarm=False)) == 4
