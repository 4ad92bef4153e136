"""EdgeAgent over a real small bundle; the link is the only fake, at its named seam `agent.replicas`."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CollectorRegistry

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import WholeImage
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exploration import EXPLORE_EVERY
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.exit_rule import certified, exit_rule
from isthmus.edge_agent.vision.metrics import REASONS, EdgeMetrics
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.edge_agent.vision.router import FALLBACK_RESERVE_S, HEAD_IDLE_AT_MOST
from isthmus.edge_agent.vision.task_answers import Classification
from isthmus.models.errors import (
    AgentClosed,
    DeadlineExceeded,
    InvalidInput,
    IsthmusError,
    LinkDown,
    Overloaded,
    PayloadTooLarge,
)
from isthmus.models.messages import CloudReply, Codec, Payload
from isthmus.models.vision import certificates
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import open_image, preprocess
from isthmus.models.vision.manifest import NEVER
from tests.fake_link import AnyLink, Asked

PROBABILITIES = ((0.25, 0.75), (0.5, 0.125, 0.375))  # of defect and colour
POINTS = [("light", 0.5, rate) for rate in range(3)] + [("light", 1.0, rate) for rate in range(3)]
POINTS += [("deep", 1.0, rate) for rate in range(2)]


@dataclass
class FakeLink(AnyLink):
    """Answers PROBABILITIES, or raises; records the payloads it is given. It is lost while it has a refusal."""

    error: IsthmusError | None = None
    refusal: str | None = None
    estimate: LinkEstimate = LinkEstimate(0.01, 1e6)
    ready: bool = True
    target: str = "cloud:1"
    payloads: list[Payload] = field(default_factory=list)
    tasks: list[tuple[int, ...]] = field(default_factory=list)
    budgets_s: list[float] = field(default_factory=list)

    @property
    def state(self) -> str:  # type: ignore[override]
        return "open" if self.refusal else "closed"

    def answer(self, asked: Asked) -> Exchange:
        size = len(asked.payload.data) + 30
        self.payloads.append(asked.payload)
        asked.sent(size)
        self.tasks.append(asked.tasks)
        self.budgets_s.append(asked.budget_s)
        if self.error is not None:
            raise self.error
        return Exchange(CloudReply(tuple(PROBABILITIES[task] for task in asked.tasks), 0.001, 0.002), size, 25, 0.02)


@dataclass
class Case:
    agent: EdgeAgent
    link: FakeLink
    registry: CollectorRegistry

    def degraded(self, reason: str) -> float | None:
        return self.registry.get_sample_value("isthmus_edge_degraded_responses_total", {"reason": reason})


@pytest.fixture
def case(tiny_bundle: Bundle) -> Iterator[Case]:
    registry = CollectorRegistry()
    config = EdgeConfig(tiny_bundle.folder, threads=1, min_agreement=0.0)  # every rate is good enough
    with EdgeAgent(config, EdgeMetrics(registry, tiny_bundle.manifest)) as agent:
        link = FakeLink()
        agent.replicas = Replicas([link])  # type: ignore[list-item]
        yield Case(agent, link, registry)


def in_mode(case: Case, mode: str) -> Case:
    case.agent.config = replace(case.agent.config, mode=mode)  # type: ignore[arg-type]
    return case


def exits_from(case: Case, confidence: float) -> None:
    """Both exits answer from this score on."""
    case.agent.exit_rule = replace(case.agent.exit_rule, confidences=(confidence, confidence))


def test_a_confident_exit_answers_and_sends_nothing(case: Case, photo: Image.Image) -> None:
    exits_from(case, 0.0)
    case.link.estimate = LinkEstimate(10.0, 1.0)  # too slow to be tried before the first exit
    answer = case.agent.infer(photo)
    assert (answer.route, answer.exit, answer.degraded, answer.bytes_up) == ("exit", "exit0", False, 0)
    assert case.link.payloads == []


def test_the_share_of_inputs_that_each_exit_answers_is_recorded(case: Case, photo: Image.Image) -> None:
    case.link.estimate = LinkEstimate(10.0, 1.0)  # too slow to be tried
    case.agent.costs.expect_exits([0.5, 0.5])
    shares = case.agent.costs.exit_share
    exits_from(case, 0.0)
    case.agent.infer(photo)
    assert [share.value for share in shares] == pytest.approx([0.51, 0.5]), "exit0 answered it, exit1 has seen none"
    exits_from(case, NEVER)
    case.agent.infer(photo)
    assert [share.value for share in shares] == pytest.approx([0.4998, 0.49]), "neither answered the second"


def test_the_bundle_says_how_many_inputs_exits_answer_at_first(case: Case) -> None:
    head = case.agent.manifest.heads["fp32"]
    best = certified(head, case.agent.config.epsilon)
    assert best is not None and best.coverage > 0
    left = math.prod(1 - share.value for share in case.agent.costs.exit_share)
    assert 1 - left == pytest.approx(best.coverage)


@pytest.mark.parametrize("mode", ["edge", "offload"])
def test_a_mode_that_fixes_the_route_says_nothing_about_the_exits(case: Case, photo: Image.Image, mode: str) -> None:
    case.agent.costs.expect_exits([0.3, 0.3])
    in_mode(case, mode).agent.infer(photo)
    assert [share.value for share in case.agent.costs.exit_share] == [0.3, 0.3]


def latent_of(case: Case, photo: Image.Image, tap: str, width: float) -> NDArray[np.float32]:
    """The latent of a photo as the device's own graphs compute it."""
    head, index = case.agent._head, ("light", "deep").index(tap)
    x_CHW = preprocess(photo, case.agent.manifest.preprocessing)
    if tap == "deep":
        for segment in range(2):
            x_CHW, _ = head.segment(segment, x_CHW)
    return head.encode(index, x_CHW, 1 if (tap, width) == ("light", 1.0) else 0)


@pytest.mark.parametrize(("tap", "width", "rate"), POINTS)
def test_a_requested_point_is_sent_as_exactly_that_quantised_latent(
    case: Case, tiny_bundle: Bundle, photo: Image.Image, tap: str, width: float, rate: int
) -> None:
    answer = case.agent.infer(photo, tap=tap, width=width, rate=rate)
    (payload,) = case.link.payloads
    index = ("light", "deep").index(tap)
    assert (payload.codec, payload.tap, payload.rate) == (Codec.BOTTLENECK, index, rate)
    codec = tiny_bundle.codec(index)
    expected_CHW = codec.quantise(latent_of(case, photo, tap, width), rate)
    np.testing.assert_array_equal(codec.decode(payload.data, rate), expected_CHW)
    assert (answer.tap, answer.width, answer.rate) == (tap, width, rate)
    assert (answer.label, answer.probabilities, answer.route) == ("bad", (0.25, 0.75), "split")
    assert answer.bytes_up == len(payload.data) + 30
    assert ("head" in answer.stage_ms) == (tap == "deep")
    assert f"tap {tap}, width {width}, rate {rate} requested" in answer.why


def test_rates_and_widths_change_from_request_to_request(case: Case, photo: Image.Image) -> None:
    found = [case.agent.infer(photo, tap=tap, width=width, rate=rate) for tap, width, rate in POINTS]
    assert [(answer.tap, answer.width, answer.rate) for answer in found] == POINTS
    assert len({payload.data for payload in case.link.payloads}) == len(POINTS)


def test_the_router_chooses_what_a_request_leaves_open(case: Case, photo: Image.Image) -> None:
    """Over a fast link either encoder may be the faster one, so the rest of the point is not asserted."""
    assert case.agent.infer(photo, rate=1).rate == 1
    assert case.agent.infer(photo, width=0.5).width == 0.5
    assert case.agent.infer(photo, tap="deep").tap == "deep"
    case.agent.config = replace(case.agent.config, min_agreement=0.97)
    answer = case.agent.infer(photo, tap="light")
    assert (answer.width, answer.rate) == (1.0, 2), "the only point of this quality"


def test_a_forced_split_is_sent_however_confident_an_exit_is_and_however_slow_the_link(
    case: Case, photo: Image.Image
) -> None:
    exits_from(case, 0.0)
    case.link.estimate = LinkEstimate(10.0, 1.0)
    assert case.agent.infer(photo, tap="deep").route == "split"
    assert case.agent.infer(photo, rate=0).route == "split"


@pytest.mark.parametrize("mode", ["edge", "offload", "split", "auto"])
def test_overrides_hold_in_any_mode(case: Case, photo: Image.Image, mode: str) -> None:
    answer = in_mode(case, mode).agent.infer(photo, tap="light", width=0.5, rate=1)
    assert (answer.route, answer.tap, answer.width, answer.rate) == ("split", "light", 0.5, 1)


def test_mode_split_sends_a_bottleneck_of_the_owners_quality(case: Case, photo: Image.Image) -> None:
    case.agent.config = replace(case.agent.config, mode="split", min_agreement=0.97)
    answer = case.agent.infer(photo)
    assert (answer.route, answer.tap, answer.width, answer.rate) == ("split", "light", 1.0, 2)
    assert answer.why.startswith("mode split; fastest: light 1 rate 2")


def test_the_router_weighs_every_bottleneck_before_the_head_runs(case: Case, photo: Image.Image) -> None:
    for segment in case.agent.costs.segment_s:
        segment.calibrate(10.0)
    for way in case.agent.manifest.images:
        case.agent.costs.bytes_of(way).value = 1e6
    answer = case.agent.infer(photo, deadline_s=100.0)
    assert (answer.route, answer.tap) == ("split", "light")
    assert "head" not in answer.stage_ms
    assert answer.why.startswith("fastest: light ") and "against" in answer.why


def test_a_forced_split_without_a_cloud_is_answered_by_the_deepest_exit(case: Case, photo: Image.Image) -> None:
    case.link.refusal = "the cloud is down"
    answer = case.agent.infer(photo, tap="light", rate=2)
    assert (answer.route, answer.exit, answer.tap, answer.rate) == ("fallback", "exit1", None, None)
    assert answer.why == "tap light, rate 2 requested; the cloud is down; exit1 is the best answer available"
    assert case.link.payloads == []


@pytest.mark.parametrize("arguments", [{}, {"tap": "light"}, {"tasks": ["colour"]}, {"deadline_s": 0.001}])
@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_a_device_without_a_configured_cloud_is_not_degraded(
    case: Case, photo: Image.Image, arguments: dict[str, Any], confidence: float
) -> None:
    case.agent.replicas = Replicas([])
    exits_from(case, confidence)
    answer = case.agent.infer(photo, **arguments)
    assert (answer.route, answer.degraded) == ("exit", False)
    assert confidence < 2 or "no cloud is configured" in answer.why
    assert all(not case.degraded(reason) for reason in REASONS)


@pytest.mark.parametrize("deadline_s", [0, 0.0009, -1, 600.5, float("nan"), float("inf")])
def test_a_deadline_out_of_range_is_refused_as_on_the_command_line(
    case: Case, photo: Image.Image, deadline_s: float
) -> None:
    with pytest.raises(InvalidInput, match=r"deadline_s is .*, expected 0\.001 to 600"):
        case.agent.infer(photo, deadline_s)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tap": "x"}, "tap 'x' does not exist, there are light, deep"),
        ({"width": 0.3}, "width 0.3 does not exist, there are 0.5, 1"),
        ({"tap": "deep", "rate": 2}, "rate 2 does not exist at tap deep, there are 0 to 1"),
        ({"tasks": ["defect", "size"]}, "task 'size' does not exist, there are defect, colour"),
    ],
)
def test_unknown_names_and_values_are_refused(
    case: Case, photo: Image.Image, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        case.agent.infer(photo, **arguments)
    assert case.link.payloads == []


@pytest.mark.parametrize(
    ("names", "sent"),
    [(["defect"], (0,)), (["colour"], (1,)), (["defect", "colour"], (0, 1)), (["colour", "defect"], (0, 1))],
)
@pytest.mark.parametrize("mode", ["auto", "split", "offload"])
def test_one_upload_answers_every_task_requested(
    case: Case, photo: Image.Image, mode: str, names: list[str], sent: tuple[int, ...]
) -> None:
    answer = in_mode(case, mode).agent.infer(photo, tasks=names)
    assert case.link.tasks == [sent]
    expected = {
        "defect": Classification("bad", 1, (0.25, 0.75)),
        "colour": Classification("red", 0, (0.5, 0.125, 0.375)),
    }
    assert list(answer.answers.items()) == [(name, expected[name]) for name in names]
    first = expected[names[0]]
    assert (answer.label, answer.index, answer.probabilities) == (first.label, first.index, first.probabilities)
    assert (answer.missing, answer.degraded) == ((), False)


def test_the_agents_own_tasks_are_answered_when_none_is_named(case: Case, photo: Image.Image) -> None:
    case.agent.config = replace(case.agent.config, tasks=("colour",))
    assert list(case.agent.infer(photo).answers) == ["colour"]
    assert list(case.agent.infer(photo, tasks=["defect"]).answers) == ["defect"]


def test_no_exit_answers_a_task_that_it_does_not_have(case: Case, photo: Image.Image) -> None:
    case.agent.costs.expect_exits([0.3, 0.3])
    exits_from(case, 0.0)
    answer = case.agent.infer(photo, tasks=["colour"])
    assert answer.route in ("split", "offload")
    assert answer.why.startswith("exits do not answer colour; fastest: ")
    case.agent.infer(photo, tasks=["colour"], tap="deep")  # past both exits
    shares = [share.value for share in case.agent.costs.exit_share]
    assert shares == [0.3, 0.3], "it says nothing about how often exits answer"


@pytest.mark.parametrize("names", [["colour"], ["colour", "defect"], ["defect", "colour"]])
@pytest.mark.parametrize("mode", ["auto", "edge", "split", "offload"])
@pytest.mark.parametrize("cause", ["refused", "failed"])
def test_without_a_cloud_the_first_task_is_answered_and_the_others_are_missing(
    case: Case, photo: Image.Image, names: list[str], mode: str, cause: str
) -> None:
    if cause == "refused":
        case.link.refusal = "the cloud is down"
    case.link.error = LinkDown("gone")
    answer = in_mode(case, mode).agent.infer(photo, tasks=names)
    assert (answer.route, answer.degraded, answer.missing) == ("fallback", True, ("colour",))
    assert list(answer.answers) == ["defect"] and answer.answers["defect"].label == answer.label
    assert answer.label in ("good", "bad") and sum(answer.probabilities) == pytest.approx(1)
    assert case.registry.get_sample_value("isthmus_edge_missing_answers_total", {"task": "colour"}) == 1


def test_settings_with_an_unknown_task_are_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(InvalidInput, match="task 'size' does not exist"):
        EdgeAgent(EdgeConfig(tiny_bundle.folder, tasks=("size",)))


def test_the_deadline_of_the_cloud_leaves_time_for_the_devices_own_answer(case: Case, photo: Image.Image) -> None:
    for seconds in (2.0, 2.0):
        case.agent.costs.segment_s[0].calibrate(seconds)
    own_s = case.agent.costs.segment_s[0].value / 2  # the estimated load moves while it encodes
    case.agent.infer(photo, tap="light", deadline_s=5.0)
    assert case.link.budgets_s[0] <= 5.0 - FALLBACK_RESERVE_S - own_s
    case.agent.infer(photo, tap="deep", deadline_s=5.0)
    assert case.link.budgets_s[1] > case.link.budgets_s[0], "its answer is there already"


def test_every_graph_is_calibrated_before_the_first_photo(case: Case) -> None:
    costs, guesses = case.agent.costs, Costs(case.agent.manifest, open_profile("wifi"))
    for tap in range(2):
        for measured, guessed in zip(costs.encode_s[tap], guesses.encode_s[tap], strict=True):
            assert measured.value not in (0.0, guessed.value)
    for measured, guessed in zip(costs.segment_s, guesses.segment_s, strict=True):
        assert measured.value not in (0.0, guessed.value)


def test_the_size_of_a_payload_is_recorded_at_its_own_point(case: Case, photo: Image.Image) -> None:
    case.agent.infer(photo, tap="light", width=0.5, rate=2)
    sizes = {case.agent.costs.points.name(p): average.value for p, average in case.agent.costs.point_bytes.items()}
    assert sizes["light 0.5 rate 2"] == len(case.link.payloads[0].data)
    assert (sizes["light 1 rate 2"], sizes["light 0.5 rate 1"]) == (120, 80)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_offload_sends_the_photo_as_configured(case: Case, photo: Image.Image, form: str) -> None:
    whole = WholeImage(form)  # type: ignore[arg-type]
    case.agent.config = replace(case.agent.config, mode="offload", whole_image=whole)
    assert case.agent.infer(photo).route == "offload"
    (payload,) = case.link.payloads
    with Image.open(io.BytesIO(payload.data)) as sent:
        assert sent.format == form.upper()
        assert sent.size == photo.size


def test_large_photos_are_made_smaller_before_they_travel_small_ones_are_left(case: Case, photo: Image.Image) -> None:
    in_mode(case, "offload")
    case.agent.infer(photo.resize((640, 320)))
    case.agent.infer(photo.resize((40, 50)))
    assert [open_image(payload.data).size for payload in case.link.payloads] == [(128, 64), (40, 50)]


def test_grey_photos_travel_with_one_channel(case: Case, photo: Image.Image) -> None:
    in_mode(case, "offload").agent.infer(photo.convert("L"))
    with Image.open(io.BytesIO(case.link.payloads[0].data)) as sent:
        assert sent.mode == "L"


@pytest.mark.parametrize("mode", ["auto", "split", "offload"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LinkDown("gone"), "cloud_down"),
        (DeadlineExceeded("late"), "deadline"),
        (Overloaded("full"), "rejected"),
        (PayloadTooLarge("large"), "too_large"),
        (InvalidInput("strange"), "rejected"),
    ],
)
def test_whatever_the_link_raises_an_exit_answers(
    case: Case, photo: Image.Image, mode: str, error: IsthmusError, reason: str
) -> None:
    case.link.error = error
    answer = in_mode(case, mode).agent.infer(photo)
    assert answer.route == "fallback"
    assert answer.degraded
    assert answer.exit is not None
    assert sum(answer.probabilities) == pytest.approx(1)
    assert str(error) in answer.why
    assert case.degraded(reason) == 1


def test_a_photo_whose_cloud_is_lost_is_answered_by_the_next(case: Case, photo: Image.Image) -> None:
    lost = FakeLink(LinkDown("gone"), target="lost:1")
    case.agent.replicas = Replicas([lost, case.link])  # type: ignore[list-item]
    answer = case.agent.infer(photo, rate=0)
    assert (answer.route, answer.degraded) == ("split", False)
    assert answer.why.endswith("; but lost:1: gone, sent to cloud:1")
    assert lost.payloads == case.link.payloads and answer.bytes_up == 2 * (len(lost.payloads[0].data) + 30)


def test_the_estimate_is_of_the_link_that_will_be_used(case: Case, photo: Image.Image) -> None:
    lost = FakeLink(refusal="gone", target="lost:1")
    case.agent.replicas = Replicas([lost, case.link])  # type: ignore[list-item]
    case.link.estimate = LinkEstimate(5.0, 1e6)
    assert case.agent.infer(photo).route == "fallback", "no reply of the second would be in time"
    assert case.degraded("deadline") == 1


def test_nothing_is_sent_while_the_breaker_is_open(case: Case, photo: Image.Image) -> None:
    case.link.refusal = "the cloud is down"
    answer = case.agent.infer(photo)
    assert case.link.payloads == []
    assert (answer.route, answer.exit) == ("fallback", "exit1")
    assert "the cloud is down" in answer.why
    assert case.degraded("cloud_down") == 1


def test_no_time_left_counts_as_deadline(case: Case, photo: Image.Image) -> None:
    case.link.estimate = LinkEstimate(5.0, 1e6)
    assert case.agent.infer(photo).route == "fallback"
    assert case.degraded("deadline") == 1


@pytest.mark.parametrize(("tap", "width", "rate"), [("light", 0.5, 2), ("light", 1.0, 2), ("deep", 1.0, 1)])
def test_a_payload_over_the_cap_is_sent_at_the_next_cheaper_rate_of_the_same_width(
    case: Case, photo: Image.Image, tap: str, width: float, rate: int
) -> None:
    codec = case.agent._codecs[("light", "deep").index(tap)]
    case.agent.infer(photo, tap=tap, width=width, rate=rate)
    codec.max_bytes = len(case.link.payloads[0].data) - 4
    cheaper = case.agent.infer(photo, tap=tap, width=width, rate=rate)
    assert (cheaper.tap, cheaper.width, cheaper.rate) == (tap, width, rate - 1)
    assert len(case.link.payloads[1].data) <= codec.max_bytes
    point = next(p for p in case.agent.costs.point_bytes if case.agent.costs.points.parts(p) == (tap, width, rate - 1))
    assert case.agent.costs.point_bytes[point].value == len(case.link.payloads[1].data)


@pytest.mark.parametrize("tap", ["light", "deep"])
def test_a_payload_over_the_cap_at_every_rate_is_answered_on_the_device(
    case: Case, photo: Image.Image, tap: str
) -> None:
    for codec in case.agent._codecs:
        codec.max_bytes = 4
    answer = case.agent.infer(photo, tap=tap)
    assert answer.route == "fallback"
    assert case.link.payloads == []
    assert case.degraded("too_large") == 1


def test_photos_come_as_image_bytes_or_path(case: Case, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    case.link.refusal = "none"
    answers = [case.agent.infer(given) for given in (photo, path.read_bytes(), path, str(path))]
    assert len({answer.probabilities for answer in answers}) == 1


@pytest.mark.parametrize("bad", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50), "/nowhere/photo.png"])
def test_unreadable_photos_are_refused(case: Case, bad: bytes | str) -> None:
    with pytest.raises(InvalidInput):
        case.agent.infer(bad)


def test_answers_are_json(case: Case, photo: Image.Image) -> None:
    answer = case.agent.infer(photo)
    assert json.loads(json.dumps(answer.as_dict()))["label"] == answer.label
    both = case.agent.infer(photo, tasks=["colour", "defect"], tap="light", width=0.5, rate=2)
    shown = json.loads(json.dumps(both.as_dict()))
    assert (shown["tap"], shown["width"], shown["rate"], shown["missing"]) == ("light", 0.5, 2, [])
    assert shown["answers"]["colour"] == {"label": "red", "index": 0, "probabilities": [0.5, 0.125, 0.375]}


def test_epsilon_picks_the_certified_thresholds(tiny_bundle: Bundle) -> None:
    head = tiny_bundle.manifest.heads["fp32"]
    by_epsilon = {each.epsilon: each.confidences for each in head.thresholds if each.among == "all"}
    assert exit_rule(head, 0.02).confidences == by_epsilon[0.02] == (0.97, 0.96)
    assert exit_rule(head, 0.025).confidences == by_epsilon[0.02]
    assert exit_rule(head, 0.02, "agreement").confidences == exit_rule(head, 0.0).confidences == (NEVER, NEVER)


def test_precision_picks_head_and_thresholds(tiny_bundle: Bundle, photo: Image.Image) -> None:
    answers = {}
    for precision, confidence in (("fp32", 0.99), ("int8", 0.98)):
        with EdgeAgent(EdgeConfig(tiny_bundle.folder, precision=precision)) as agent:  # type: ignore[arg-type]
            assert agent.exit_rule.confidences[0] == confidence
            answers[precision] = agent.infer(photo).probabilities
    np.testing.assert_allclose(answers["int8"], answers["fp32"], atol=0.1)
    assert answers["int8"] != answers["fp32"]


@pytest.mark.parametrize("mode", ["split", "offload", "sideways"])
def test_settings_that_contradict_each_other_are_refused(tiny_bundle: Bundle, mode: str) -> None:
    with pytest.raises(InvalidInput, match=mode):
        EdgeAgent(EdgeConfig(tiny_bundle.folder, (), mode))  # type: ignore[arg-type]


def test_a_wrong_estimate_of_the_head_does_not_last(case: Case, photo: Image.Image) -> None:
    """While whole images or the light tap win, the head does not run, and its estimate would never be corrected."""
    case.link.estimate = LinkEstimate(0.0, 1e9)
    for average in case.agent.costs.cloud_s_per_mac.values():
        average.value = 1e-15
    for segment in case.agent.costs.segment_s:
        segment.calibrate(30.0)
    before_s = case.agent.costs.segment_s[0]._idle.value
    answers = [case.agent.infer(photo, deadline_s=600.0) for _ in range(HEAD_IDLE_AT_MOST)]
    assert {answer.route for answer in answers[:-1]} <= {"offload", "split"}
    assert ["head" in answer.stage_ms for answer in answers] == [False] * (HEAD_IDLE_AT_MOST - 1) + [True]
    assert case.agent.costs.segment_s[0]._idle.value < before_s


def test_the_runtimes_telemetry_is_off() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_a_request_after_close_is_a_clear_error(tiny_bundle: Bundle, photo: Image.Image) -> None:
    agent = EdgeAgent(EdgeConfig(tiny_bundle.folder, threads=1))
    agent.close()
    with pytest.raises(AgentClosed, match="was closed"):
        agent.infer(photo)


def test_bytes_that_were_sent_count_even_without_a_reply(case: Case, photo: Image.Image) -> None:
    case.link.error = DeadlineExceeded("late")
    answer = case.agent.infer(photo, tap="light", rate=0)
    (payload,) = case.link.payloads
    assert (answer.degraded, answer.bytes_up) == (True, len(payload.data) + 30)


def test_a_cloud_excluded_by_its_estimate_is_explored_now_and_then(case: Case, photo: Image.Image) -> None:
    """A stalled estimate must not keep every photo on the device; a reply that does not come makes it rarer."""
    case.link.estimate = LinkEstimate(10.0, 1e6)
    routes = [case.agent.infer(photo, deadline_s=5.0).route for _ in range(2 * EXPLORE_EVERY)]
    assert [route == "fallback" for route in routes] == [*[True] * (EXPLORE_EVERY - 1), False] * 2
    case.link.error = DeadlineExceeded("late")
    case.link.payloads.clear()
    for _ in range(100):
        case.agent.infer(photo, deadline_s=5.0)
    assert len(case.link.payloads) == 4, "after 5, 10, 20 and 40 photos"


def test_a_wild_time_claimed_by_the_cloud_is_bounded_by_the_time_that_passed(case: Case, photo: Image.Image) -> None:
    costs = case.agent.costs
    costs.record_cloud(Payload(Codec.IMAGE, 0, 0, b""), 0.01)
    wild = CloudReply((PROBABILITIES[0],), 0.0, 4294.0)
    case.link.infer = lambda *arguments: Exchange(wild, 100, 25, 0.02)  # type: ignore[method-assign]
    for _ in range(5):
        assert case.agent.infer(photo, rate=0).route == "split"
    assert costs.cloud_s(Codec.BOTTLENECK, costs.tail_macs.index(min(costs.tail_macs))) <= 0.02


def test_void_certificates_keep_exits_from_answering(
    photo: Image.Image, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    certified = tiny_bundle.manifest.heads["fp32"].depends_on.runtime
    monkeypatch.setattr(certificates, "runtime", lambda: "onnxruntime 9.9")
    why = f"no exit answers early, as its certificates are void: certified with {certified}, this is onnxruntime 9.9"
    registry = CollectorRegistry()
    with EdgeAgent(EdgeConfig(tiny_bundle.folder, threads=1), EdgeMetrics(registry, tiny_bundle.manifest)) as agent:
        agent.exit_rule = replace(agent.exit_rule, confidences=(0.0, 0.0))
        answer = agent.infer(photo)
        agent.config = replace(agent.config, mode="edge")
        alone = agent.infer(photo)
    assert answer.why.startswith(why) and why in caplog.text
    assert (alone.route, alone.why) == ("exit", "mode edge")
    assert registry.get_sample_value("isthmus_edge_certificates_void") == 1
