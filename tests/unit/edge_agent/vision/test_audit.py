"""The audit in an agent: what is sent, what is kept, and what it changes. The link is a fake."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from prometheus_client import CollectorRegistry

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.cli.main import main
from isthmus.edge_agent.config import Audits
from isthmus.edge_agent.policy.audit import Audit, Level, Pair
from isthmus.edge_agent.policy.drift import DriftGate
from isthmus.edge_agent.vision.audit import MOST_QUEUED, Auditor, Device
from isthmus.edge_agent.vision.audited_pairs import AuditedPairs
from isthmus.edge_agent.vision.exit_rule import exit_rule
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.errors import LinkDown
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import preprocess


class Case:
    """An agent whose first exit answers everything, and whose cloud says `label`."""

    def __init__(
        self, bundle: Bundle, folder: Path, auto: bool = False, share: float = 1.0, strict: bool = False
    ) -> None:
        self.registry, self.asked, self.label, self.error = CollectorRegistry(), 0, 0, False
        metrics = EdgeMetrics(self.registry, bundle.manifest)
        self.agent = EdgeAgent(EdgeConfig(bundle.folder, threads=1), metrics)
        self.file = folder / "pairs.db"
        self.pairs = AuditedPairs(self.file)
        device = Device(self.agent._head, self.agent._slots, lambda: False, self.cloud, self.agent._use_thresholds)
        levels = [Level((0.0, 0.0)), Level((2.0, 2.0))]
        rule = exit_rule(bundle.manifest.heads["fp32"], 0.0)
        self.agent._auditor = self.auditor = Auditor(
            Audit(0.05, levels, share, strict=strict), self.pairs, rule, device, metrics.audit, auto, DriftGate()
        )

    def cloud(self, image: Image.Image) -> int:
        self.asked += 1
        if self.error:
            raise LinkDown("gone")
        return self.label

    def count(self, result: str) -> float | None:
        labels = {"model": "tiny", "result": result}
        return self.registry.get_sample_value("isthmus_edge_audited_photos_total", labels)


@pytest.fixture
def case(tiny_bundle: Bundle, tmp_path: Path) -> Case:
    return Case(tiny_bundle, tmp_path)


def answer(case: Case, photo: Image.Image, times: int = 1) -> None:
    for _ in range(times):
        case.agent.infer(photo)
        case.auditor.wait()


def test_an_exits_answer_is_checked_and_the_pair_is_kept(case: Case, photo: Image.Image) -> None:
    found = case.agent.infer(photo)
    case.auditor.wait()
    (pair,) = case.pairs.pairs(in_alarm=False)
    assert case.asked == 1 and len(pair.scores) == len(pair.answers) == 2, "every exit is judged"
    case.label = pair.answers[0]
    answer(case, photo)
    assert case.count("agree") == 1 + (found.index == 0)
    case.agent.close()


def test_disagreement_raises_the_alarm_and_exits_answer_no_more(case: Case, photo: Image.Image) -> None:
    case.label = 7  # what no exit answers
    answer(case, photo, 8)
    assert case.auditor.audit.alarm and min(case.agent.exit_rule.confidences) > 1
    assert case.registry.get_sample_value("isthmus_edge_audit_alarm", {"model": "tiny"}) == 1
    assert case.registry.get_sample_value("isthmus_edge_audit_alarms_total", {"model": "tiny"}) == 1
    case.agent.close()


@pytest.mark.parametrize("strict", [False, True])
def test_photos_unlike_those_before_are_audited_until_enough_keep_the_promise(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr("isthmus.edge_agent.policy.drift.FIRST", 20)
    case, random = Case(tiny_bundle, tmp_path, share=1e-9, strict=strict), np.random.default_rng(0)
    thresholds, spec = case.agent.exit_rule.confidences, tiny_bundle.manifest.preprocessing

    def agreeing(image: Image.Image) -> int:
        case.asked += 1
        return int(case.agent._head.segment(0, preprocess(image, spec))[1].argmax())

    object.__setattr__(case.auditor._device, "cloud", agreeing)

    def photos(least: int, most: int, count: int) -> None:
        for _ in range(count):
            case.agent.infer(random.integers(least, most, (64, 64, 3), np.uint8))
            case.auditor.wait()

    def metric(name: str) -> float | None:
        return case.registry.get_sample_value(f"isthmus_edge_{name}", {"model": "tiny"})

    photos(0, 200, 120)
    assert (case.asked, metric("drift"), metric("audit_alarm")) == (0, 0, 0)
    photos(100, 256, 50)
    assert (metric("drift"), metric("drifts_total"), metric("audit_alarms_total")) == (1, 1, 1) and case.asked
    assert (case.agent.exit_rule.confidences == thresholds) is not strict
    again = Audit(0.05, case.auditor.audit.levels, 0.01)
    with case.pairs.entry() as state:
        assert again.load(state["audit"]) and again.doubted, "it is on disk with the first pair"
    for _ in range(case.auditor.audit.pairs_due):
        case.auditor._record(Pair((0.9, 0.9), (1, 1), 1))
    assert (metric("drift"), metric("audit_alarm")) == (0, 0) and case.pairs.pairs(in_alarm=True) == []
    assert case.agent.exit_rule.confidences == thresholds
    case.agent.close()


def test_a_cloud_that_fails_costs_an_audit_and_no_answer(case: Case, photo: Image.Image) -> None:
    case.error = True
    answer(case, photo, 3)
    assert (case.count("failed"), case.pairs.pairs(in_alarm=False)) == (3, [])
    case.agent.close()


def test_private_photos_are_never_sent(case: Case, photo: Image.Image) -> None:
    case.agent.infer(photo, private=True)
    case.auditor.wait()
    assert case.asked == 0 and case.auditor._thread is None
    case.agent.close()


def test_what_the_caller_does_with_its_image_later_is_not_sent(case: Case, photo: Image.Image) -> None:
    mine, sent, goes_on = photo.copy(), list[Image.Image](), threading.Event()

    def cloud(image: Image.Image) -> int:
        goes_on.wait(10)
        sent.append(image)
        return 0

    object.__setattr__(case.auditor._device, "cloud", cloud)
    case.agent.infer(mine)
    mine.paste((0, 0, 0), (0, 0, *mine.size))  # a buffer that the next photo goes into, which may be a private one
    goes_on.set()
    case.auditor.wait()
    assert [image.tobytes() for image in sent] == [photo.tobytes()]
    case.agent.close()


def test_whatever_is_wrong_with_an_audit_the_photo_is_answered(
    case: Case, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    assert case.agent.infer(photo).route == "exit"
    assert case.count("failed") == 1
    monkeypatch.undo()
    answer(case, photo)
    assert case.asked == 1, "the next one is audited"
    case.agent.close()


def test_answers_do_not_wait_for_a_cloud_that_hangs_and_the_queue_is_bounded(case: Case, photo: Image.Image) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def cloud(image: Image.Image) -> int:
        begun.set()
        goes_on.wait(10)
        return 0

    object.__setattr__(case.auditor._device, "cloud", cloud)
    case.agent.infer(photo)
    assert begun.wait(10)
    for _ in range(MOST_QUEUED + 3):
        assert case.agent.infer(photo).route == "exit"
    assert case.count("skipped") == 3
    goes_on.set()
    case.auditor.wait()
    case.agent.close()


def test_after_close_nothing_is_sent_and_the_thread_has_ended(case: Case, photo: Image.Image) -> None:
    answer(case, photo)
    case.agent.close()
    assert case.auditor._thread is not None and not case.auditor._thread.is_alive()
    with pytest.raises(sqlite3.ProgrammingError):
        case.pairs.pairs(in_alarm=False)


def test_a_child_of_a_fork_leaves_the_audit_to_its_parent(
    case: Case, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(case, photo)
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        case.agent.close()
    assert len(case.pairs.pairs(in_alarm=False)) == 1, "the file is open, the thread goes on"
    case.auditor.close()


def test_a_state_that_is_not_readable_begins_anew(case: Case, photo: Image.Image) -> None:
    with case.pairs.entry() as state:
        state["audit"] = {**case.auditor.audit.dump(), "levels": [[0.5], ["a", "b"]]}
    answer(case, photo)
    case.pairs._file.execute("UPDATE state SET value = 'no JSON'")
    answer(case, photo)
    assert len(case.pairs.pairs(in_alarm=False)) == 2 and case.agent.exit_rule.confidences == (0.0, 0.0)
    with case.pairs.entry() as state:
        assert state["audit"] == case.auditor.audit.dump()
    case.agent.close()


def test_a_share_of_zero_audits_nothing(tiny_bundle: Bundle, tmp_path: Path, photo: Image.Image) -> None:
    case = Case(tiny_bundle, tmp_path, share=0.0)
    answer(case, photo, 5)
    assert case.asked == 0
    assert EdgeAgent(EdgeConfig(tiny_bundle.folder, audits=Audits(share=0.0)))._auditor is None
    case.agent.close()


def test_pairs_are_bounded_and_stay_after_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge_agent.vision.audited_pairs.MOST_PAIRS", 3)
    pairs = AuditedPairs(tmp_path / "deep" / "pairs.db")
    for cloud in range(5):
        with pairs.entry() as state:
            pairs.add(Pair((0.5,), (1,), cloud), alarm=cloud > 3)
            state["audit"] = {"count": cloud}
    again = AuditedPairs(tmp_path / "deep" / "pairs.db")  # the first was never closed, as after a kill
    assert [pair.cloud for pair in again.pairs(in_alarm=False)] == [2, 3, 4]
    assert [pair.cloud for pair in again.pairs(in_alarm=True)] == [4]
    with again.entry() as state:
        assert state == {"audit": {"count": 4}}


def test_an_entry_that_fails_changes_nothing(tmp_path: Path) -> None:
    pairs = AuditedPairs(tmp_path / "pairs.db")
    with pytest.raises(ZeroDivisionError), pairs.entry() as state:
        pairs.add(Pair((0.5,), (1,), 1), alarm=False)
        state["audit"] = 1 // 0
    assert pairs.pairs(in_alarm=False) == []


def test_a_file_that_cannot_be_used_is_replaced_by_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pairs.db").write_bytes(b"not a database" * 100)
    pairs = AuditedPairs.kept_in(tmp_path / "pairs.db")
    with pairs.entry():
        pairs.add(Pair((0.5,), (1,), 1), alarm=False)
    assert len(pairs.pairs(in_alarm=False)) == 1 and "kept in memory" in caplog.text


def recalibrate(bundle: Bundle, folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        main, ["recalibrate", "--bundle", str(bundle.folder), "--audit-folder", str(folder), *options]
    )
    return done.exit_code, done.output


def test_recalibrate_says_what_is_lacking(tiny_bundle: Bundle, tmp_path: Path) -> None:
    code, output = recalibrate(tiny_bundle, tmp_path)
    assert code != 0 and "there are no audited pairs" in output
    name = f"audit-tiny-{tiny_bundle.manifest.fingerprint[:12]}-fp32.db"
    pairs = AuditedPairs(tmp_path / name)
    with pairs.entry():
        pairs.add(Pair((0.9, 0.9), (1, 1), 1), alarm=False)
    code, output = recalibrate(tiny_bundle, tmp_path)
    assert code != 0 and "1 audited pairs are too few: at least" in output


def test_recalibrate_certifies_and_keeps_new_thresholds(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pairs = AuditedPairs(tmp_path / f"audit-tiny-{tiny_bundle.manifest.fingerprint[:12]}-fp32.db")
    with pairs.entry():
        for _ in range(1200):
            pairs.add(Pair((0.9, 0.9), (1, 1), 1), alarm=False)
    code, output = recalibrate(tiny_bundle, tmp_path)
    assert code == 0 and "1200 audited photos" in output
    code, output = recalibrate(tiny_bundle, tmp_path, "--json")
    (first, *_) = json.loads(output)["certificates"]
    assert code == 0 and (first["pairs"], first["disagreement"], first["coverage"]) == (1200, 0, 1)
    with pairs.entry() as state:
        assert state["audit"]["levels"]
