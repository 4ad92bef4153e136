"""Where photos are sent when there are several clouds. The links are fakes; time is what the test says is left."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import pytest

from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.transport.health import FAIR_WAIT_S
from isthmus.edge_agent.vision.replicas import MARGIN, Replicas
from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.models.errors import (
    AgentClosed,
    DeadlineExceeded,
    Draining,
    InvalidInput,
    InvalidReply,
    IsthmusError,
    LinkDown,
    Overloaded,
    PayloadCorrupt,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.messages import CloudReply, Codec, Payload
from tests.fake_link import AnyLink, Asked

PAYLOAD = Payload(Codec.BOTTLENECK, 0, 0, bytes(1000))
REPLY = Exchange(CloudReply(((0.25, 0.75),), 0.0, 0.0), 1000, 25, 0.01)


@dataclass(eq=False)
class FakeLink(AnyLink):
    """Answers REPLY, or raises; records the seconds it was given."""

    target: str
    error: IsthmusError | None = None
    state: str = "closed"
    ready: bool = True
    refusal: str | None = None
    estimate: LinkEstimate = LinkEstimate(0.01, 1e6)
    budgets_s: list[float] = field(default_factory=list)
    on_send: Callable[[], None] = lambda: None

    def answer(self, asked: Asked) -> Exchange:
        self.budgets_s.append(asked.budget_s)
        asked.charge(1000)
        asked.sent(1000)
        self.on_send()
        if self.error is not None:
            raise self.error
        return REPLY

    def wait_probed(self, timeout_s: float) -> bool:
        self.budgets_s.append(timeout_s)
        return self.state != "open"


class Scene:
    """Two clouds, a:1 and b:2, and a photo for which `left_s` seconds are left."""

    def __init__(self) -> None:
        self.a, self.b = FakeLink("a:1"), FakeLink("b:2")
        self.replicas = Replicas([self.a, self.b])  # type: ignore[list-item]
        self.state = RequestState(InferenceRequest((0,), (), False, None), 10.0)
        self.left_s = 1.0

    def infer(self, cloud_s: float = 0.02) -> Exchange:
        return self.replicas.infer(PAYLOAD, (0,), self.state, lambda: self.left_s, cloud_s)

    @property
    def sent(self) -> list[int]:
        return [len(self.a.budgets_s), len(self.b.budgets_s)]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_first_is_used_while_it_answers(scene: Scene) -> None:
    assert scene.infer() is REPLY
    assert (scene.sent, scene.state.detours) == ([1, 0], [])


@pytest.mark.parametrize(
    "error",
    [
        LinkDown("gone"),
        DeadlineExceeded("late"),
        Draining("bye"),
        Overloaded("full"),
        ServiceError("failed"),
        InvalidReply("wild"),
        UnknownBundle("another bundle"),
    ],
)
def test_a_photo_goes_to_the_next_cloud_when_one_fails(scene: Scene, error: IsthmusError) -> None:
    scene.a.error = error
    assert scene.infer() is REPLY
    assert scene.sent == [1, 1]
    assert scene.state.detours == [f"a:1: {error}, sent to b:2"]
    assert scene.state.up_bytes == 2000, "what was sent in vain counts"


@pytest.mark.parametrize("error", [InvalidInput("bad"), PayloadCorrupt("bad"), AgentClosed("closed")])
def test_a_fault_of_the_caller_is_one_everywhere(scene: Scene, error: IsthmusError) -> None:
    scene.a.error = error
    with pytest.raises(type(error)):
        scene.infer()
    assert scene.sent == [1, 0]


def test_each_cloud_is_tried_once_and_the_last_error_is_raised(scene: Scene) -> None:
    scene.a.error, scene.b.error = LinkDown("gone"), Overloaded("full")
    with pytest.raises(Overloaded, match="full"):
        scene.infer()
    assert scene.sent == [1, 1] and scene.state.detours == ["a:1: gone, sent to b:2"]


def test_nothing_is_sent_again_without_time_for_it(scene: Scene) -> None:
    scene.a.error = DeadlineExceeded("late")
    scene.a.on_send = lambda: setattr(scene, "left_s", 0.005)
    with pytest.raises(DeadlineExceeded):
        scene.infer()
    assert scene.sent == [1, 0]


def test_nothing_is_sent_again_for_a_photo_that_nobody_waits_for(scene: Scene) -> None:
    scene.a.error = LinkDown("gone")
    scene.a.on_send = lambda: setattr(scene.state, "cancelled", True)
    with pytest.raises(CancelledError):
        scene.infer()
    assert scene.sent == [1, 0]


def test_a_silent_cloud_leaves_time_for_the_next(scene: Scene) -> None:
    scene.b.estimate = LinkEstimate(0.1, 1e5)
    scene.infer()
    assert scene.a.budgets_s == [pytest.approx(1.0 - MARGIN * (0.1 + 0.01 + 0.02))]
    scene.b.estimate = LinkEstimate(0.001, 1e9)
    scene.infer()
    assert scene.a.budgets_s[1] == pytest.approx(1.0 - FAIR_WAIT_S), "a busy device is no lost cloud"


def test_where_there_is_no_time_for_two_the_first_has_all_of_it(scene: Scene) -> None:
    scene.left_s = 2 * FAIR_WAIT_S - 0.01
    scene.infer()
    assert scene.a.budgets_s == [scene.left_s]


def test_the_last_cloud_has_all_the_time(scene: Scene) -> None:
    scene.a.error = LinkDown("gone")
    scene.infer()
    assert scene.b.budgets_s == [1.0]


def test_a_cloud_that_may_not_be_used_is_passed_over(scene: Scene) -> None:
    scene.a.state = "open"
    assert scene.replicas.current is scene.b  # type: ignore[comparison-overlap]
    scene.infer()
    assert scene.sent == [0, 1] and scene.state.detours == []
    scene.a.state = "half_open"
    scene.infer()
    assert scene.sent == [1, 1], "the preferred one is tried as soon as it answers probes"


def test_one_with_much_to_do_is_passed_over_while_another_has_room(scene: Scene) -> None:
    scene.a.ready = False
    assert scene.replicas.best() is scene.b  # type: ignore[comparison-overlap]
    scene.b.ready = False
    assert scene.replicas.best() is scene.a  # type: ignore[comparison-overlap]


def test_while_none_can_be_used_each_says_why(scene: Scene) -> None:
    scene.a.state = scene.b.state = "open"
    scene.a.refusal, scene.b.refusal = "connection refused", "it holds another bundle"
    assert scene.replicas.best() is None and scene.replicas.current is scene.a  # type: ignore[comparison-overlap]
    words = "a:1: connection refused; b:2: it holds another bundle"
    assert scene.replicas.unavailable_reason() == words
    with pytest.raises(LinkDown, match=words):
        scene.infer()
    assert scene.sent == [0, 0]


def test_words_for_one_cloud_and_for_none(scene: Scene) -> None:
    scene.a.refusal = "connection refused"
    assert Replicas([scene.a]).unavailable_reason() == "connection refused"  # type: ignore[list-item]
    assert Replicas([]).unavailable_reason() == "no cloud is configured"
    assert not Replicas([]) and Replicas([]).current is None


def test_the_start_waits_for_the_first_cloud_or_another(scene: Scene) -> None:
    scene.replicas.wait_probed(2.0)
    assert scene.sent == [1, 0]
    scene.a.state = "open"
    scene.replicas.wait_probed(2.0)
    assert scene.sent == [2, 1] and scene.b.budgets_s[0] <= 2.0
