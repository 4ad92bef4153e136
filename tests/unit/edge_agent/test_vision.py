"""EdgeAgent over a real small bundle; the link is the only fake, at its named seam `agent.link`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from edge_agent import EdgeAgent, EdgeConfig
from edge_agent.config import WholeImage
from edge_agent.link import Reply
from edge_agent.metrics import EdgeMetrics
from edge_agent.policy.estimates import LinkEstimate
from edge_agent.vision import HEAD_IDLE_AT_MOST, NEVER, exit_confidence
from models.bundle import Bundle
from models.errors import DeadlineExceeded, InvalidInput, IsthmusError, LinkDown, Overloaded, PayloadTooLarge
from models.types import CloudAnswer, Codec, Payload
from models.vision.images import open_image, preprocess


@dataclass
class FakeLink:
    """Answers 0.25 to 0.75, or raises; remembers what it was asked."""

    error: IsthmusError | None = None
    refusal: str | None = None
    estimate: LinkEstimate = LinkEstimate(0.01, 1e6)
    state: str = "closed"
    asked: list[Payload] = field(default_factory=list)

    def usable(self) -> str | None:
        return self.refusal

    def ask(self, payload: Payload, budget_s: float) -> Reply:
        self.asked.append(payload)
        if self.error is not None:
            raise self.error
        return Reply(CloudAnswer((0.25, 0.75), 0.001, 0.002), len(payload.data) + 30, 25, 0.02)

    def close(self) -> None:
        pass


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
        agent.link = link  # type: ignore[assignment]
        yield Case(agent, link, registry)


def pinned(case: Case, mode: str) -> Case:
    case.agent.config = replace(case.agent.config, mode=mode)  # type: ignore[arg-type]
    return case


def test_a_sure_exit_answers_and_sends_nothing(case: Case, photo: Image.Image) -> None:
    case.agent.goal = replace(case.agent.goal, exit_confidence=0.0)
    case.link.estimate = LinkEstimate(10.0, 1.0)  # too slow to be tried before the first exit
    answer = case.agent.infer(photo)
    assert (answer.route, answer.exit, answer.degraded, answer.bytes_up) == ("exit", "exit0", False, 0)
    assert case.link.asked == []


def test_split_sends_exactly_the_quantised_latent(case: Case, tiny_bundle: Bundle, photo: Image.Image) -> None:
    answer = pinned(case, "split").agent.infer(photo)
    (payload,) = case.link.asked
    assert (payload.codec, payload.rate) == (Codec.FACTORIZED, answer.rate)
    codec, x_CHW = tiny_bundle.codec(), preprocess(photo, tiny_bundle.manifest.preprocessing)
    for index in range(2):
        x_CHW, _ = case.agent._head.segment(index, x_CHW)
    expected_CHW = codec.quantise(case.agent._head.encode(x_CHW), payload.rate)
    np.testing.assert_array_equal(codec.decode(payload.data, payload.rate), expected_CHW)
    assert (answer.label, answer.probabilities, answer.route) == ("bad", (0.25, 0.75), "split")
    assert answer.bytes_up == len(payload.data) + 30


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_offload_sends_the_photo_as_configured(case: Case, photo: Image.Image, form: str) -> None:
    whole = WholeImage(form)  # type: ignore[arg-type]
    case.agent.config = replace(case.agent.config, mode="offload", whole_image=whole)
    assert case.agent.infer(photo).route == "offload"
    (payload,) = case.link.asked
    with Image.open(io.BytesIO(payload.data)) as sent:
        assert sent.format == form.upper()
        assert sent.size == photo.size


def test_large_photos_are_made_smaller_before_they_travel_small_ones_are_left(case: Case, photo: Image.Image) -> None:
    pinned(case, "offload")
    case.agent.infer(photo.resize((640, 320)))
    case.agent.infer(photo.resize((40, 50)))
    assert [open_image(payload.data).size for payload in case.link.asked] == [(128, 64), (40, 50)]


def test_grey_photos_travel_with_one_channel(case: Case, photo: Image.Image) -> None:
    pinned(case, "offload").agent.infer(photo.convert("L"))
    with Image.open(io.BytesIO(case.link.asked[0].data)) as sent:
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
    answer = pinned(case, mode).agent.infer(photo)
    assert answer.route == "fallback"
    assert answer.degraded
    assert answer.exit is not None
    assert sum(answer.probabilities) == pytest.approx(1)
    assert str(error) in answer.why
    assert case.degraded(reason) == 1


def test_an_open_breaker_is_not_knocked_at(case: Case, photo: Image.Image) -> None:
    case.link.refusal = "the cloud is down"
    answer = case.agent.infer(photo)
    assert case.link.asked == []
    assert (answer.route, answer.exit) == ("fallback", "exit1")
    assert "the cloud is down" in answer.why
    assert case.degraded("cloud_down") == 1


def test_no_time_left_counts_as_deadline(case: Case, photo: Image.Image) -> None:
    case.link.estimate = LinkEstimate(5.0, 1e6)
    assert case.agent.infer(photo).route == "fallback"
    assert case.degraded("deadline") == 1


def test_a_payload_over_the_cap_is_sent_at_the_next_cheaper_rate(case: Case, photo: Image.Image) -> None:
    codec = case.agent._codec
    answer = pinned(case, "split").agent.infer(photo)
    codec.max_bytes = len(case.link.asked[0].data) - 4
    cheaper = case.agent.infer(photo)
    assert (answer.rate, cheaper.rate) == (1, 0)
    assert len(case.link.asked[1].data) <= codec.max_bytes


def test_a_payload_over_the_cap_at_every_rate_is_answered_here(case: Case, photo: Image.Image) -> None:
    case.agent._codec.max_bytes = 4
    answer = pinned(case, "split").agent.infer(photo)
    assert answer.route == "fallback"
    assert case.link.asked == []
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


def test_epsilon_picks_the_certified_threshold(tiny_bundle: Bundle) -> None:
    by_epsilon = {threshold.epsilon: threshold.confidence for threshold in tiny_bundle.manifest.thresholds}
    assert exit_confidence(tiny_bundle.manifest, 0.02) == by_epsilon[0.02]
    assert exit_confidence(tiny_bundle.manifest, 0.025) == by_epsilon[0.02]
    assert exit_confidence(tiny_bundle.manifest, 0.0) == NEVER


@pytest.mark.parametrize("mode", ["split", "offload", "sideways"])
def test_settings_that_contradict_each_other_are_refused(tiny_bundle: Bundle, mode: str) -> None:
    with pytest.raises(InvalidInput, match=mode):
        EdgeAgent(EdgeConfig(tiny_bundle.folder, None, mode))  # type: ignore[arg-type]


def test_a_wrong_estimate_of_the_head_does_not_last(case: Case, photo: Image.Image) -> None:
    """While whole images win, the head is not run and its estimate would never be put right."""
    case.link.estimate = LinkEstimate(0.0, 1e9)
    case.agent.costs.cloud_s_per_mac.value = 1e-15
    for average in case.agent.costs.segment_s:
        average.value = 10.0
    routes = [case.agent.infer(photo).route for _ in range(HEAD_IDLE_AT_MOST)]
    assert routes[:-1] == ["offload"] * (HEAD_IDLE_AT_MOST - 1)
    assert case.agent.costs.segment_s[0].value < 10.0


def test_nothing_is_reported_to_the_makers_of_the_runtime() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
