from __future__ import annotations

import pytest

from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_session import Fallback, RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import LinkDown
from isthmus.models.messages import GREEDY, Sampling
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, bound

PROMPT = (3, 1, 4, 1, 5)


def answer(
    cloud: Cloud, fallback: Fallback | None = None, sampling: Sampling = GREEDY
) -> tuple[list[Token], GenerationStats]:
    sequence, stats = AnswerSequence(GenerationRequest(PROMPT, 20, "cloud", sampling), ENDS), GenerationStats()
    replicas = Replicas([cloud], bound(), 0.05)  # type: ignore[list-item]
    session = RemoteSession(replicas, sequence, stats, token_opening(sequence, 0))
    rounds = Rounds(session, sequence, stats, SpeculationStats())
    return list(RemoteArm(sequence, session, rounds, fallback).tokens()), stats


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 0.9, 7)])
def test_one_round_brings_the_whole_answer(sampling: Sampling) -> None:
    brain = Brain(1, ends=False)
    cloud = Cloud(brain)
    tokens, stats = answer(cloud, sampling=sampling)
    assert [token.id for token in tokens] == brain.answer(PROMPT, 20, sampling)
    assert {token.source for token in tokens} == {"cloud"} and stats.rounds == 1
    (talk,) = cloud.talks
    assert len(talk.rounds) == 1 and talk.closed and stats.bytes_up > 0


def test_a_lost_stream_is_opened_again_from_the_committed_tokens() -> None:
    brain = Brain(2, ends=False)
    cloud = Cloud(brain, fault=lambda answer: LinkDown("gone") if answer in (3, 9) else None)
    tokens, stats = answer(cloud)
    assert [token.id for token in tokens] == brain.answer(PROMPT, 20)
    assert len(cloud.talks) == 3 and stats.why.startswith("gone") and not stats.degraded


def test_without_a_cloud_the_fallback_answers() -> None:
    own = Brain(3, ends=False)
    tokens, stats = answer(Cloud(Brain(2), alone=10**6), lambda text: Token(own.next(text), "edge"))
    assert [token.id for token in tokens] == own.answer(PROMPT, 20) and stats.degraded
