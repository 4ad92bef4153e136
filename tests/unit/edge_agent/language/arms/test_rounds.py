"""What rounds keep of drafts and replies; whole answers over them are in test_verify.py."""

from __future__ import annotations

import pytest

from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import ServiceError
from isthmus.models.messages import Committed
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, bound

PROMPT = (3, 1, 4, 1, 5)
BRAIN = Brain(3, ends=False)
RIGHT = BRAIN.answer(PROMPT, 20)


class Scene:
    """Rounds that are open at one scripted cloud."""

    def __init__(self) -> None:
        self.cloud = Cloud(BRAIN, width=64)
        self.sequence, self.stats = AnswerSequence(GenerationRequest(PROMPT, 20, "verify"), ENDS), GenerationStats()
        replicas = Replicas([self.cloud], bound(), 0.05)  # type: ignore[list-item]
        session = RemoteSession(replicas, self.sequence, self.stats, token_opening(self.sequence, 0))
        session.prepare()
        self.rounds = Rounds(session, self.sequence, self.stats, SpeculationStats())
        self.rounds.open()

    def draft(self, *ids: int) -> None:
        self.rounds.drafts += [(id_, 0.5) for id_ in ids]

    def commit(self, committed: Committed) -> list[int]:
        return [token.id for token in self.rounds.commit(committed)]


def test_accepted_drafts_leave_and_the_others_wait() -> None:
    scene = Scene()
    scene.draft(*RIGHT[:3])
    scene.rounds.send(scene.rounds.unsent)
    scene.rounds.sent = 3
    scene.draft(*RIGHT[3:6])
    assert scene.rounds.unsent == tuple(RIGHT[3:6]) and (len(scene.rounds), scene.rounds.live) == (1, 1)
    assert scene.commit(Committed(5, 3, (RIGHT[3],))) == RIGHT[:4]
    assert scene.rounds.unsent == tuple(RIGHT[4:6]) and scene.rounds.sent == 0 and len(scene.rounds) == 0
    assert (scene.stats.accepted, scene.stats.rejected) == (3, 0)


def test_a_wrong_draft_drops_what_followed_it() -> None:
    scene = Scene()
    other = (RIGHT[1] + 1) % 11
    scene.draft(RIGHT[0], other, 7)
    scene.rounds.send(scene.rounds.unsent)
    scene.rounds.sent = 3
    scene.rounds.send((8, 9))
    assert scene.commit(Committed(5, 1, (RIGHT[1],))) == RIGHT[:2]
    assert scene.rounds.drafts == [] and scene.rounds.live == 0 and len(scene.rounds) == 1
    assert scene.stats.rejected == 2
    assert scene.commit(Committed(7)) == [], "the reply to a round that is stale commits nothing"


def test_drafts_for_a_text_that_others_continued_are_dropped() -> None:
    scene = Scene()
    scene.draft(*RIGHT[:2])
    scene.rounds.open()
    assert scene.rounds.unsent == tuple(RIGHT[:2]), "the same text: they may still be right"
    scene.sequence.append(RIGHT[0])
    scene.rounds.open()
    assert scene.rounds.drafts == []


def test_a_stream_lets_the_cloud_decode_the_rest() -> None:
    scene = Scene()
    scene.rounds.send()
    scene.rounds.streaming = True
    scene.rounds.send()
    assert [round_.extend for round_ in scene.cloud.talks[0].rounds] == [0, 19]


@pytest.mark.parametrize("nonsense", [Committed(9, 0, (1,)), Committed(5, 0, (1,))])
def test_what_was_not_asked_is_refused(nonsense: Committed) -> None:
    with pytest.raises(ServiceError, match="what it was not asked"):
        Scene().commit(nonsense)
