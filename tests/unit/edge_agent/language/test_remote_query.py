"""Single tokens by the cloud over one stream, whatever becomes of the queries before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.language.remote_query import RemoteQuery
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import ContextGone, LinkDown, ServiceError
from isthmus.models.messages import Committed
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, Talk, bound

PROMPT = (3, 1, 4, 1, 5)
BRAIN = Brain(2, ends=False)


class Scene:
    """A query over one scripted cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.sequence, self.stats = AnswerSequence(GenerationRequest(PROMPT, 100, "auto"), ENDS), GenerationStats()
        replicas = Replicas([cloud], bound(), 0.05)  # type: ignore[list-item]
        opening = token_opening(self.sequence, 0)
        self.session = RemoteSession(replicas, self.sequence, self.stats, opening)
        self.query = RemoteQuery(self.session, self.sequence, self.stats, SpeculationStats())

    def next(self) -> Token:
        (token,) = self.query.tokens(lambda text: Token(BRAIN.next(text), "edge"))
        return token


@given(seed=st.integers(0, 1000), steps=st.lists(st.sampled_from(["local", "ask", "token"]), max_size=30))
def test_tokens_are_the_models_and_cross_few_streams(seed: int, steps: list[str]) -> None:
    scene = Scene(Cloud(BRAIN, seed=seed))
    for step in steps:
        if step == "local":
            scene.sequence.append(BRAIN.next(scene.sequence.tokens))
        elif step == "ask":
            scene.query.ask()
            assert scene.query.is_pending
        else:
            assert scene.next().source == "cloud"
    assert scene.sequence.tokens == [*PROMPT, *BRAIN.answer(PROMPT, scene.sequence.generated)]
    scene.query.close()
    assert all(talk.closed for talk in scene.cloud.talks) and not scene.stats.degraded
    assert len(scene.cloud.talks) <= 1 + steps.count("ask"), "only a query given up may cost a stream"
    assert scene.cloud.failures == []


def test_queries_that_are_answered_share_one_stream() -> None:
    scene = Scene(Cloud(BRAIN))
    for _ in range(10):
        scene.sequence.append(BRAIN.next(scene.sequence.tokens))
        scene.query.ask()
        scene.next()
    (talk,) = scene.cloud.talks
    assert [len(opening.tokens) for opening in talk.openings] == [6, *[1] * 9]
    assert scene.stats.rounds == 10


@pytest.mark.parametrize("error", [ContextGone("elsewhere"), LinkDown("gone")])
def test_a_lost_session_is_opened_again(error: Exception) -> None:
    scene = Scene(Cloud(BRAIN, fault=lambda answer: error if answer in (0, 3) else None))
    for _ in range(4):
        scene.next()
        scene.sequence.append(BRAIN.next(scene.sequence.tokens))
    assert scene.sequence.tokens == [*PROMPT, *BRAIN.answer(PROMPT, 8)]
    assert not scene.stats.degraded


def test_without_a_cloud_the_fallback_decides() -> None:
    scene = Scene(Cloud(BRAIN, alone=10**6))
    scene.query.ask()
    assert scene.query.answered, "nobody waits for what cannot come"
    assert scene.next().source == "edge" and scene.stats.fell_back and scene.stats.degraded


@pytest.mark.parametrize("nonsense", [Committed(2, tokens=(1,)), Committed(5), Committed(5, tokens=(1, 2))])
def test_nonsense_is_not_followed(nonsense: Committed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Talk, "receive", lambda talk: nonsense)
    scene = Scene(Cloud(BRAIN))
    with pytest.raises(ServiceError, match="what it was not asked"):
        list(scene.query.tokens(None))
