from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.spending import Budgets
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle
from tests.bench import router
from tests.bench.router_arms import always, follow, oracle, single_arms
from tests.bench.router_grid import Bench, hindsight, in_time, latency_targets, once, ratio, settled, traces
from tests.bench.router_record import answers, recording
from tests.bench.router_recording import FORMS, Recording, Stages
from tests.bench.router_simulation import route
from tests.bench.router_world import Conditions, Outcome, Walk, World
from tests.bench.sc2_photos import Photos

COUNT = 6
LINK = Conditions(1.0, 0.1)


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The tiny bundle's real answers, with stage times of a device and a cloud of two speeds."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(COUNT)]
    photos = Photos(images.__getitem__, np.arange(COUNT) % 2)
    cache = tmp_path_factory.mktemp("recording") / "rows.jsonl"
    rows = answers(tiny_bundle, photos, range(COUNT), cache)
    assert answers(tiny_bundle, photos, range(COUNT), cache) == rows
    assert len(cache.read_text(encoding="utf-8").splitlines()) == COUNT
    stages = Stages(
        decode=[0.003],
        segments=[[0.04, 0.06] for _ in tiny_bundle.manifest.segments],
        encode=[[[0.02] for _ in tap.widths] for tap in tiny_bundle.manifest.taps],
        image_encode={form: [0.002] for form in FORMS},
        cloud_image=[0.03],
        cloud_tap=[[0.03] for _ in tiny_bundle.manifest.taps],
        exchange=[0.001],
    )
    return recording(tiny_bundle, photos.labels_N.tolist(), rows, stages)


@pytest.fixture
def bench(tiny_bundle: Bundle, recorded: Recording) -> Bench:
    config = EdgeConfig(tiny_bundle.folder, ("simulated:1",), deadline_s=2.0)
    return Bench(recorded, tiny_bundle.manifest, config)


def test_a_recording_survives_its_file(recorded: Recording, tmp_path: Path) -> None:
    recorded.save(tmp_path / "recording.json")
    again = Recording.load(tmp_path / "recording.json")
    assert again.stages == recorded.stages and again.points.keys() == recorded.points.keys()
    assert np.array_equal(again.exits_NEK, recorded.exits_NEK) and len(again) == COUNT
    assert all(np.array_equal(again.images[form].bytes_N, recorded.images[form].bytes_N) for form in FORMS)


def test_another_order_has_the_same_photos(recorded: Recording) -> None:
    again = recorded.shuffled(1)
    assert again.labels_N.tolist() != recorded.labels_N.tolist()
    rows, others = (
        sorted(zip(each.exits_NEK[:, 0, 0], each.labels_N, each.images["png"].bytes_N, strict=True))
        for each in (recorded, again)
    )
    assert rows == others


def test_a_recording_with_other_ways_is_refused(tiny_bundle: Bundle, elpv_bundle: Bundle, recorded: Recording) -> None:
    assert router.bench_of(tiny_bundle, recorded).recording is recorded
    with pytest.raises(InvalidInput, match="recording of bundle tiny has other exits, taps or rates than .*elpv"):
        router.bench_of(elpv_bundle, recorded)


def test_a_budget_of_calls_is_never_overspent(bench: Bench) -> None:
    world = bench.world([(0.0, Conditions(25, 0.01))], device=4.0)
    free = route(world, bench.manifest, bench.config, 60, 1.0)
    few = replace(bench.config, budgets=Budgets(calls_hour=40))
    sent = [found.up_bytes > 0 for found in route(world, bench.manifest, few, 60, 1.0)]
    assert sum(found.up_bytes > 0 for found in free) > 40
    assert 0 < sum(sent) <= 4 + 36 * 60 / 3600, "a tenth at once, the rest evenly over the hour"


def test_bytes_take_their_time_and_wait_for_the_end_of_an_outage(recorded: Recording) -> None:
    world = World(recorded, [(0.0, LINK), (1.0, Conditions(0, 0.1)), (3.0, Conditions(2.0, 0.2))])
    assert world.arrives(0.0, 12_500, 0) == pytest.approx(0.1 + 0.05)
    assert world.arrives(0.95, 12_500, 0) == pytest.approx(3.0 + 0.025 + 0.1)  # half of it before, half after
    assert world.arrives(2.0, 0, 0) == pytest.approx(3.1)
    assert world.arrives(-5.0, 12_500, 0) == pytest.approx(-4.85)


def test_lost_packets_cost_a_timeout_for_their_share_of_messages(recorded: Recording) -> None:
    lossy, clean = (World(recorded, [(0.0, replace(LINK, loss=loss))]) for loss in (0.1, 0.0))
    late = sum(lossy.arrives(0.0, 100, photo) > clean.arrives(0.0, 100, photo) for photo in range(1000))
    assert 60 < late < 140


def test_a_walk_adds_up(recorded: Recording) -> None:
    world = World(recorded, [(0.0, LINK)], device=2.0)
    local = world.walk(1, Walk(1), 5.0)
    assert local.seconds == pytest.approx(2 * (0.003 + 0.06)) and local.up_bytes == 0
    sent = world.walk(0, Walk(0, "png"), 5.0)
    size = recorded.images["png"].bytes_N[0]
    expected_s = 2 * (0.003 + 0.002) + 0.1 + 8e-6 * (size + 41 + 80) + 0.03 + 0.001
    assert sent.seconds == pytest.approx(expected_s) and sent.answer == recorded.cloud_N[0]


def test_no_arm_waits_beyond_the_deadline(recorded: Recording) -> None:
    world = World(recorded, [(0.0, Conditions(0.0, 0.1))], deadline_s=0.5)
    found = world.walk(0, Walk(0, "png"), 0.0)
    assert found.late and found.seconds == 0.5 and found.answer == recorded.exits_NEK[0, 0].argmax()


def test_the_router_never_waits_beyond_the_deadline_either(bench: Bench) -> None:
    world = bench.world([(0.0, Conditions(5, 0.05)), (4.0, Conditions(0, 0.05)), (34.0, Conditions(5, 0.05))])
    outcomes = route(world, bench.manifest, bench.config, 100, 0.5)
    assert all(found.seconds <= bench.config.deadline_s + 1e-9 for found in outcomes)
    cut = [found for found in outcomes if 10 < found.started_s < 33]
    assert cut and all(found.seconds < 0.3 for found in cut), "a cloud that is known to be lost is not waited for"
    assert any(found.up_bytes for found in outcomes if found.started_s > 45), "and found again"


def test_a_run_is_the_same_every_time(bench: Bench) -> None:
    world = bench.world(traces()["markov"])
    assert route(world, bench.manifest, bench.config, 30, 0.5) == route(world, bench.manifest, bench.config, 30, 0.5)


def test_no_rule_is_faster_than_the_oracle_among_those_that_agree(bench: Bench) -> None:
    world = bench.world([(0.0, LINK)])
    arms = single_arms(bench.recording, bench.manifest)
    assert len(arms) == len(bench.manifest.segments) + len(bench.recording.points) + len(FORMS)
    best = follow(world, oracle(arms), COUNT, 0.0)
    assert all(found.answer == bench.recording.cloud_N[found.photo] for found in best)
    whole = follow(world, always(arms["png"]), COUNT, 0.0)
    assert sum(found.seconds for found in best) <= sum(found.seconds for found in whole)


def test_the_best_arm_in_hindsight_is_of_the_routers_quality() -> None:
    rows = {
        "router": {"mean_ms": 50.0, "accuracy": 0.9, "agreement": 0.98},
        "arm a": {"mean_ms": 10.0, "accuracy": 0.95, "agreement": 0.97},
        "arm b": {"mean_ms": 60.0, "accuracy": 0.9, "agreement": 0.98},
        "arm c": {"mean_ms": 80.0, "accuracy": 0.9, "agreement": 1.0},
        "SPINN": {"mean_ms": 5.0, "accuracy": 1.0, "agreement": 1.0},
    }
    assert hindsight(rows) == "arm b" and ratio(rows, "arm b") == pytest.approx(50 / 60, abs=1e-4)
    assert once([{"runs": rows}])["best_arm"] == "arm b"
    assert ratio(rows, None) is None


def test_a_latency_target_counts_where_an_arm_of_the_wished_agreement_meets_it(bench: Bench) -> None:
    assert in_time([Outcome(0, 0.0, 0.1, "x", 0, 0), Outcome(0, 0.0, 0.3, "x", 0, 0)], 0.2) == 0.5
    wished = replace(bench, config=replace(bench.config, min_agreement=0.0))
    rows = latency_targets(wished, COUNT, quick=True)
    assert rows and all(row["best"] >= bench.config.target_share for row in rows)
    assert all(row["router"] >= bench.config.target_share for row in rows if row["target_s"] == 0.8)


def test_after_a_step_only_what_has_settled_counts(recorded: Recording) -> None:
    def run(seconds: float) -> list[Outcome]:
        return [Outcome(0, float(start_s), seconds, "png", int(recorded.cloud_N[0]), 0) for start_s in range(120)]

    rows = settled(recorded, {"router": run(0.2), "arm png": run(0.1)}, [0.0, 60.0])
    assert [(row["from_s"], row["ratio"]) for row in rows] == [(10.0, 2.0), (70.0, 2.0)]


def test_the_command_in_quick_mode(tiny_bundle: Bundle, recorded: Recording, tmp_path: Path) -> None:
    recorded.save(tmp_path / "recording.json")
    arguments = ["--bundle", str(tiny_bundle.folder), "--recording", str(tmp_path / "recording.json"), "--quick"]
    arguments += ["--photos", "6", "--json", str(tmp_path / "out" / "router.json")]
    found = CliRunner().invoke(router.main, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "out" / "router.json").read_text(encoding="utf-8"))
    assert len(result["cells"]) == 4 and list(result["traces"]) == ["steps"]
    assert {"SPINN", "Sedna", "fixed confidence", "Neurosurgeon", "oracle", "router"} <= result["cells"][0][
        "runs"
    ].keys()
    assert "4 cells; against the best arm in hindsight" in found.output
