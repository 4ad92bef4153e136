"""Answers with a scripted cloud: whatever drafts, network and faults do, the text is the cloud's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.arms.verify import TokenTimer, VerifyArm
from isthmus.edge_agent.language.remote_session import ATTEMPTS, RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats, WorkClock
from isthmus.edge_agent.policy.averages import Average
from isthmus.edge_agent.policy.speculation import RETRY_ANSWERS, Acceptance, MeasuredLatency, SpeculationStats
from isthmus.models.errors import ContextGone, DeadlineExceeded, InvalidInput, LinkDown, Overloaded, ServiceError
from isthmus.models.language.drafts import LookupDraft
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.sampling import log_softmax
from isthmus.models.messages import GREEDY, Committed, Round, Sampling
from isthmus.protos.limits import MAX_DRAFT
from tests.unit.edge_agent.language.scripted_cloud import ENDS, EOS, VOCAB, Brain, Cloud, Talk, bound

PROMPT = (3, 1, 4, 1, 5)
SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=7)
seeds = st.integers(0, 2**20)


class Fixed(Average):
    """What a test says it costs, whatever the clock says."""

    def observe(self, value: float) -> None:
        pass


def speculation(draft_s: float = 0.005, step_s: float = 0.03, acceptance: float = 0.95) -> SpeculationStats:
    """By default one at which drafting pays."""
    return SpeculationStats(Fixed(draft_s), Fixed(step_s), Acceptance(acceptance))


class Source:
    """Drafts that are right with probability `right`, else random ones, ends of text, or none."""

    def __init__(self, brain: Brain, right: float, silent: float = 0.0, seed: int = 0) -> None:
        self._brain, self._right, self._silent = brain, right, silent
        self._random = random.Random(seed)
        self.asked: list[list[int]] = []

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        self.asked.append(list(text))
        if self._random.random() < self._silent:
            return None
        right = self._random.random() < self._right
        token = self._brain.next(text, chooser.sampling) if right else self._random.choice([EOS, *range(VOCAB)])
        return token, self._random.random()


class Answer:
    """One answer of scripted clouds, with what the device did for it."""

    def __init__(
        self,
        *clouds: Cloud,
        count: int = 20,
        draft: Any = None,
        latency: SpeculationStats | None = None,
        alone: Callable[[Sequence[int]], Token | None] | None = None,
        replicas: Replicas | None = None,
        prompt: tuple[int, ...] = PROMPT,
        **ask: Any,
    ) -> None:
        self.clouds = clouds
        self.replicas = replicas or Replicas(clouds, bound(), 0.05)  # type: ignore[arg-type]
        self.ask = GenerationRequest(prompt, count, "verify", **ask)
        self.sequence, self.stats = AnswerSequence(self.ask, ENDS), GenerationStats()
        opening = token_opening(self.sequence, 0)
        self.session = RemoteSession(self.replicas, self.sequence, self.stats, opening)
        known = latency or speculation()
        self.arm: RemoteArm | VerifyArm
        if draft is None:
            rounds = Rounds(self.session, self.sequence, self.stats, known)
            self.arm = RemoteArm(self.sequence, self.session, rounds, alone)
        else:
            self.arm = VerifyArm(self.sequence, self.session, self.stats, known, draft, alone)
        self.tokens: list[Token] = []

    def __iter__(self) -> Iterator[Token]:
        for token in self.arm.tokens():
            self.tokens.append(token)
            yield token

    def run(self) -> Answer:
        assert len(list(self)) <= self.ask.max_tokens
        assert all(talk.closed for talk in self.talks)
        self.session.close()
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def talks(self) -> list[Talk]:
        return [talk for cloud in self.clouds for talk in cloud.talks]


def edge(brain: Brain) -> Callable[[Sequence[int]], Token]:
    return lambda text: Token(brain.next(text), "edge")


def at(*answers: int, error: Exception) -> Callable[[int], Exception | None]:
    return lambda answer: error if answer in answers else None


@given(
    seed=seeds,
    right=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    silent=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    ends=st.booleans(),
    sampling=st.sampled_from([GREEDY, SAMPLED]),
    count=st.sampled_from([1, 2, 3, 17, 60]),
    draft_s=st.sampled_from([0.0, 0.0005, 0.005, 0.1]),
    acceptance=st.sampled_from([0.05, 0.5, 0.95]),
    rtt_s=st.sampled_from([0.0, 0.01, 0.3]),
    width=st.sampled_from([1, 4, 64]),
    tight=st.booleans(),
)
def test_whatever_is_drafted_the_text_is_the_clouds(
    seed: int,
    right: float,
    silent: float,
    ends: bool,
    sampling: Sampling,
    count: int,
    draft_s: float,
    acceptance: float,
    rtt_s: float,
    width: int,
    tight: bool,
) -> None:
    brain = Brain(seed, ends)
    context = len(PROMPT) + count if tight else 10_000
    cloud = Cloud(brain, seed=seed, rtt_s=rtt_s, width=width, context=context)
    latency = speculation(draft_s, acceptance=acceptance)
    source = Source(brain, right, silent, seed)
    answer = Answer(cloud, count=count, draft=source, latency=latency, sampling=sampling, top_logprobs=2).run()
    check_exact(answer, brain)
    (talk,) = cloud.talks
    assert [token.source for token in answer.tokens] == [
        talk.truth[len(PROMPT) + index] for index in range(len(answer.ids))
    ]
    assert all(len(round_.draft) <= MAX_DRAFT for round_ in talk.rounds)
    stats = answer.stats
    assert stats.accepted == sum(token.source == "draft" for token in answer.tokens)
    assert 0 <= stats.rejected <= sum(len(round_.draft) for round_ in talk.rounds) - stats.accepted
    assert (stats.bytes_up, stats.bytes_down) == (1 + len(talk.rounds), talk.bytes_down)
    assert not stats.degraded and cloud.failures == []


def check_exact(answer: Answer, brain: Brain) -> None:
    """Tokens, log probabilities and the end are what a plain loop over the cloud's model gives."""
    ask = answer.ask
    expected = brain.answer(ask.prompt, ask.max_tokens, ask.sampling)
    assert answer.ids == expected
    assert answer.sequence.finish == ("stop" if expected[-1] == EOS else "length")
    for index, token in enumerate(answer.tokens):
        logs_V = log_softmax(brain.logits([*ask.prompt, *expected[:index]]))
        assert token.logprob == pytest.approx(float(logs_V[token.id]), abs=1e-5)
        assert [id_ for id_, _ in token.top] == sorted(range(VOCAB), key=lambda id_: -logs_V[id_])[: ask.top_logprobs]


@given(seed=seeds, rtt_s=st.sampled_from([0.0, 0.2]), ends=st.booleans())
def test_free_drafts_beside_a_stream_change_nothing(seed: int, rtt_s: float, ends: bool) -> None:
    brain = Brain(seed, ends)
    cloud = Cloud(brain, seed=seed, rtt_s=rtt_s)
    answer = Answer(cloud, count=80, draft=LookupDraft(), latency=speculation(0.0), top_logprobs=0).run()
    check_exact(answer, brain)


def test_free_drafts_are_sent_and_confirmed() -> None:
    brain = Brain(1, ends=False)
    answer = Answer(Cloud(brain), count=80, draft=LookupDraft(), latency=speculation(0.0)).run()
    assert answer.stats.accepted > 20
    assert all(round_.extend for round_ in answer.talks[0].rounds)


def test_a_good_source_saves_passes_and_a_bad_one_costs_none() -> None:
    brain = Brain(2, ends=False)
    good = Answer(Cloud(brain, width=64), count=64, draft=Source(brain, 1.0)).run().stats
    bad = Answer(Cloud(brain, width=64), count=64, draft=Source(brain, 0.0)).run().stats
    plain = Answer(Cloud(brain, width=64), count=64).run().stats
    assert plain.passes == 64 and plain.rounds == 1
    assert good.passes < 40 and good.accepted > 40
    assert bad.passes <= 64 and bad.rejected > 0


@pytest.mark.parametrize("draft_s", [0.005, 0.0])
def test_nothing_is_drafted_behind_an_end_of_text(draft_s: float) -> None:
    brain = Brain(3, ends=False)

    class Ending(Source):
        def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
            assert EOS not in text
            found = super().next(text, chooser)
            return (EOS, 0.9) if len(text) % 3 == 0 else found

    answer = Answer(Cloud(brain), count=30, draft=Ending(brain, 1.0), latency=speculation(draft_s)).run()
    assert answer.ids == brain.answer(PROMPT, 30)


def test_drafting_that_does_not_pay_is_not_tried_and_said_so() -> None:
    brain = Brain(4, ends=False)
    source = Source(brain, 1.0)
    answer = Answer(Cloud(brain), draft=source, latency=speculation(draft_s=0.2)).run()
    assert source.asked == []
    assert "drafting takes" in answer.stats.why
    assert [round_.extend for round_ in answer.talks[0].rounds] == [19]


def test_a_source_without_ideas_hands_over_to_the_cloud_in_mid_answer() -> None:
    brain = Brain(5, ends=False)

    class Short(Source):
        def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
            return None if len(text) >= 10 else super().next(text, chooser)

    answer = Answer(Cloud(brain), count=40, draft=Short(brain, 1.0)).run()
    assert answer.ids == brain.answer(PROMPT, 40)
    assert answer.talks[0].rounds[-1].extend > 20


@given(seed=seeds, gone=st.sets(st.integers(0, 8), min_size=1), draft_s=st.sampled_from([0.0, 0.005, 0.2]))
def test_a_lost_session_is_opened_again_from_its_beginning(seed: int, gone: set[int], draft_s: float) -> None:
    brain = Brain(seed, ends=False)
    gone -= {answer for answer in gone if answer - 1 in gone}  # twice without a token between is another matter
    cloud = Cloud(brain, seed=seed, fault=at(*gone, error=ContextGone("elsewhere")))
    answer = Answer(cloud, count=40, draft=Source(brain, 0.7, seed=seed), latency=speculation(draft_s), top_logprobs=1)
    answer.run()
    check_exact(answer, brain)
    openings = [opening for talk in cloud.talks for opening in talk.openings]
    assert len(openings) == 1 + sum(answer < cloud.answers for answer in gone)
    assert all(opening.start == 0 for opening in openings)


def test_a_cloud_that_keeps_losing_the_session_is_given_up() -> None:
    brain = Brain(6)
    cloud = Cloud(brain, fault=lambda answer: ContextGone("elsewhere"))
    with pytest.raises(LinkDown, match="keeps losing"):
        Answer(cloud).run()
    assert len(cloud.talks) == ATTEMPTS
    assert all(len(talk.openings) == 2 and talk.closed for talk in cloud.talks)


@given(seed=seeds, lost=st.integers(0, 8), draft_s=st.sampled_from([0.0, 0.005, 0.2]))
def test_another_replica_goes_on_from_the_committed_tokens(seed: int, lost: int, draft_s: float) -> None:
    brain = Brain(seed, ends=False)
    first = Cloud(brain, "a", seed, away=float("inf"), fault=at(lost, error=LinkDown("gone")))
    second = Cloud(brain, "b", seed + 1)
    answer = Answer(
        first, second, count=40, draft=Source(brain, 0.7, seed=seed), latency=speculation(draft_s), top_logprobs=1
    )
    answer.run()
    check_exact(answer, brain)
    if first.answers <= lost:
        return  # it had ended by then
    (talk,) = second.talks
    (opening,) = talk.openings
    told = len(PROMPT) + len(first.talks[0].truth)
    assert (opening.start, opening.tokens) == (0, (*PROMPT, *answer.ids)[:told])
    assert first.failures == ["gone"] and not answer.stats.degraded
    assert "gone" in answer.stats.why
    assert list(answer.replicas) == [second, first]


def test_without_a_cloud_the_device_goes_on_alone_and_comes_back() -> None:
    brain, own = Brain(7, ends=False), Brain(8, ends=False)
    cloud = Cloud(brain, away=3, fault=at(5, error=LinkDown("gone")))
    answer = Answer(cloud, count=30, alone=edge(own)).run()
    assert [token.source for token in answer.tokens] == ["cloud"] * 5 + ["edge"] * 3 + ["cloud"] * 22
    by_cloud, by_itself = brain.answer(PROMPT, 5), own.answer((*PROMPT, *brain.answer(PROMPT, 5)), 3)
    start = [*by_cloud, *by_itself]
    assert answer.ids == [*start, *brain.answer((*PROMPT, *start), 22)]
    assert answer.stats.degraded and "gone" in answer.stats.why


def test_alone_from_the_first_token_on_it_says_why() -> None:
    own = Brain(9)
    answer = Answer(count=30, alone=edge(own)).run()
    assert answer.ids == own.answer(PROMPT, 30)
    assert answer.sequence.finish == ("stop" if answer.ids[-1] == EOS else "length")
    assert answer.stats.degraded and answer.stats.why == "no cloud answers"


def test_it_waits_for_a_cloud_when_told_to() -> None:
    brain = Brain(10, ends=False)
    cloud = Cloud(brain, away=2, fault=at(3, error=LinkDown("gone")))  # back at the second look
    answer = Answer(cloud, replicas=Replicas([cloud], bound(), 5.0)).run()  # type: ignore[list-item]
    assert answer.ids == brain.answer(PROMPT, 20)
    assert not answer.stats.degraded
    assert [talk.openings[0].start for talk in cloud.talks] == [0, 0]  # what it lost with the link is not known


def test_waiting_ends_when_no_cloud_comes() -> None:
    cloud = Cloud(Brain(11, ends=False), away=float("inf"), fault=at(3, error=LinkDown("gone")))
    answer = Answer(cloud)
    with pytest.raises(LinkDown, match="no cloud answered"):
        answer.run()
    assert len(answer.tokens) == 3


def test_a_text_too_long_for_the_device_waits_for_the_cloud() -> None:
    brain = Brain(12, ends=False)
    cloud = Cloud(brain, away=2, fault=at(8, error=LinkDown("gone")))
    alone = edge(brain)
    answer = Answer(
        cloud,
        alone=lambda text: alone(text) if len(text) < len(PROMPT) + 8 else None,
        replicas=Replicas([cloud], bound(), 5.0),  # type: ignore[list-item]
    ).run()
    assert answer.ids == brain.answer(PROMPT, 20)
    assert not answer.stats.degraded


@pytest.mark.parametrize("error", [Overloaded("full"), ServiceError("broken"), LinkDown("gone")])
@pytest.mark.parametrize("away", [0, 1])
def test_a_cloud_that_only_fails_ends_the_answer_with_its_error(error: Exception, away: int) -> None:
    """Also one that says in between that it is well."""
    cloud = Cloud(Brain(13), away=away, fault=lambda answer: error)
    with pytest.raises(type(error), match=str(error)):
        Answer(cloud).run()
    assert len(cloud.talks) == ATTEMPTS and all(talk.closed for talk in cloud.talks)
    assert len(cloud.failures) == ATTEMPTS


def test_a_cloud_that_only_fails_leaves_the_device_alone() -> None:
    own = Brain(14, ends=False)
    cloud = Cloud(Brain(15), fault=lambda answer: Overloaded("full"))
    answer = Answer(cloud, count=5, alone=edge(own)).run()
    assert answer.ids == own.answer(PROMPT, 5)
    assert len(cloud.talks) == ATTEMPTS * 5
    assert answer.stats.degraded


def test_failures_with_progress_between_them_are_not_counted_together() -> None:
    brain = Brain(16, ends=False)
    cloud = Cloud(brain, fault=lambda answer: Overloaded("full") if answer % 2 else None)
    answer = Answer(cloud, count=3 * ATTEMPTS).run()
    assert answer.ids == brain.answer(PROMPT, 3 * ATTEMPTS)


def test_what_is_wrong_with_the_request_is_raised_and_not_tried_again() -> None:
    cloud = Cloud(Brain(17), fault=at(0, error=InvalidInput("no such token")))
    with pytest.raises(InvalidInput, match="no such token"):
        Answer(cloud, alone=edge(Brain(17))).run()
    assert len(cloud.talks) == 1 and cloud.talks[0].closed and cloud.failures == []


@pytest.mark.parametrize("draft_s", [0.005, 0.2])
def test_a_slow_cloud_that_lives_is_waited_for(draft_s: float) -> None:
    brain = Brain(18, ends=False)
    late = at(0, 1, 2, 5, error=DeadlineExceeded("slow"))
    cloud = Cloud(brain, fault=late, step_s=3.0)
    answer = Answer(cloud, count=30, draft=Source(brain, 1.0), latency=speculation(draft_s)).run()
    assert answer.ids == brain.answer(PROMPT, 30)
    assert len(cloud.talks) == 1 and cloud.failures == []


def test_patience_with_a_cloud_that_lives_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge_agent.language.remote_session.PATIENCE_S", 0.0)
    cloud = Cloud(Brain(18), fault=lambda answer: DeadlineExceeded("slow"))
    with pytest.raises(LinkDown, match="is alive, but did not reply within 0 s"):
        Answer(cloud).run()


@pytest.mark.parametrize("draft", [None, Source(Brain(18), 1.0)])
def test_a_cloud_that_lives_and_does_not_serve_is_waited_for_once(draft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every token of the local model would wait for it again."""
    monkeypatch.setattr("isthmus.edge_agent.language.remote_session.FALLBACK_PATIENCE_S", 0.0)
    own, cloud = Brain(7, ends=False), Cloud(Brain(18), fault=lambda answer: DeadlineExceeded("slow"))
    answer = Answer(cloud, draft=draft, alone=edge(own)).run()
    assert answer.ids == own.answer(PROMPT, 20) and answer.stats.degraded
    assert len(cloud.talks) == 1 and "is alive, but did not reply within 0 s" in answer.stats.why


def test_a_text_that_the_device_cannot_continue_is_patient_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge_agent.language.remote_session.FALLBACK_PATIENCE_S", 0.0)
    brain = Brain(18, ends=False)
    cloud = Cloud(brain, fault=lambda answer: DeadlineExceeded("slow") if answer == 0 else None)
    alone = edge(brain)
    answer = Answer(cloud, alone=lambda text: alone(text) if len(text) < len(PROMPT) + 3 else None).run()
    assert answer.ids == brain.answer(PROMPT, 20)
    assert [token.source for token in answer.tokens] == ["edge"] * 3 + ["cloud"] * 17 and len(cloud.talks) == 2


def test_a_silent_cloud_that_is_dead_is_lost_and_its_link_told() -> None:
    """Or every token made alone would wait for it again: a link that swallows packets fails no stream for long."""
    brain = Brain(19, ends=False)
    dead = Cloud(brain, "a", living=False, away=float("inf"), fault=at(2, error=DeadlineExceeded("slow")))
    other = Cloud(brain, "b")
    answer = Answer(dead, other).run()
    assert answer.ids == brain.answer(PROMPT, 20)
    assert len(dead.talks) == 1 and len(other.talks) == 1
    assert dead.failures == ["the cloud does not answer any more"]


def test_an_answer_given_up_early_closes_its_conversation_and_keeps_its_seat() -> None:
    brain = Brain(20, ends=False)
    cloud = Cloud(brain)
    replicas = Replicas([cloud], bound(), 1.0)  # type: ignore[list-item]
    prompt = tuple(1 + index % 9 for index in range(40))
    first = Answer(cloud, prompt=prompt, replicas=replicas, draft=Source(brain, 1.0))
    tokens = first.arm.tokens()
    said = [next(tokens).id for _ in range(6)]
    assert not cloud.talks[0].closed
    tokens.close()
    assert cloud.talks[0].closed
    first.session.close()
    turn = (*prompt, *said, 2, 2)
    second = Answer(cloud, prompt=turn, replicas=replicas).run()
    assert second.ids == brain.answer(turn, 20)
    (opening,) = cloud.talks[1].openings
    assert (opening.session, opening.start, opening.tokens) == (cloud.talks[0].openings[0].session, 46, (2, 2))


def test_a_seat_that_the_cloud_has_forgotten_costs_one_more_opening() -> None:
    brain = Brain(21, ends=False)
    cloud = Cloud(brain)
    replicas = Replicas([cloud], bound(), 1.0)  # type: ignore[list-item]
    prompt = tuple(1 + index % 9 for index in range(40))
    said = Answer(cloud, prompt=prompt, replicas=replicas).run().ids
    cloud.texts.clear()
    turn = (*prompt, *said, 2)
    answer = Answer(cloud, prompt=turn, replicas=replicas, draft=Source(brain, 1.0)).run()
    assert answer.ids == brain.answer(turn, 20)
    assert [opening.start for opening in cloud.talks[1].openings] == [60, 0]
    assert len(cloud.talks) == 2 and cloud.failures == []


def test_a_seat_in_one_cloud_is_not_looked_for_in_another() -> None:
    brain = Brain(22, ends=False)
    first, second = Cloud(brain, "a"), Cloud(brain, "b")
    replicas = Replicas([first, second], bound(), 1.0)  # type: ignore[list-item]
    prompt = tuple(1 + index % 9 for index in range(40))
    said = Answer(first, prompt=prompt, replicas=replicas).run().ids
    replicas.record_failure(first, LinkDown("gone"))  # type: ignore[arg-type]
    answer = Answer(second, prompt=(*prompt, *said, 2), replicas=replicas).run()
    assert answer.ids == brain.answer((*prompt, *said, 2), 20)
    assert [opening.start for opening in second.talks[0].openings] == [0]


def test_a_cloud_that_has_not_answered_holds_nothing_for_the_next_turn() -> None:
    brain = Brain(22, ends=False)
    first, second = Cloud(brain, "a"), Cloud(brain, "b", fault=at(0, error=InvalidInput("not now")))
    replicas = Replicas([first, second], bound(), 1.0)  # type: ignore[list-item]
    prompt = tuple(1 + index % 9 for index in range(40))
    turn = (*prompt, *Answer(first, prompt=prompt, replicas=replicas).run().ids, 2)
    replicas.record_failure(first, LinkDown("gone"))  # type: ignore[arg-type]
    failed = Answer(second, prompt=turn, replicas=replicas)
    with pytest.raises(InvalidInput):
        failed.run()
    failed.session.close()
    second.texts.clear()
    assert Answer(second, prompt=turn, replicas=replicas).run().ids == brain.answer(turn, 20)
    assert [opening.start for opening in second.talks[1].openings] == [0]


@pytest.mark.parametrize(
    "nonsense",
    [
        Committed(99, 0, (1,)),
        Committed(99, 0, (1,), extension=True),
        Committed(4, 0, (), extension=True),
        Committed(3),
    ],
    ids=["ahead of the text", "extension ahead", "empty extension", "stale though it cannot be"],
)
def test_a_cloud_that_talks_nonsense_is_not_followed(nonsense: Committed, monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(talk: Talk) -> Committed:
        return nonsense

    monkeypatch.setattr(Talk, "receive", lie)
    cloud = Cloud(Brain(23))
    with pytest.raises(ServiceError):
        Answer(cloud).run()
    assert len(cloud.talks) == ATTEMPTS


def test_an_answer_to_no_round_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(talk: Talk) -> Committed:
        return Committed(talk.rounds[0].base, 0, (1,))

    monkeypatch.setattr(Talk, "poll", endless)
    cloud = Cloud(Brain(24))
    answer = Answer(cloud, count=3, draft=Source(Brain(24), 1.0)).run()
    assert answer.ids == [1, 1, 1]
    assert cloud.failures == ["the cloud answered what it was not asked"] * 2


def test_measured_and_accepted_outlive_an_answer() -> None:
    brain = Brain(25, ends=False)
    latency = speculation(acceptance=0.88)
    for _ in range(10):
        Answer(Cloud(brain), count=60, draft=Source(brain, 1.0), latency=latency).run()
    assert latency.acceptance.overall > 0.95
    assert latency.measured.value is not None


def test_drafting_is_tried_again_after_many_answers_without_it() -> None:
    """Or one bad text would keep drafts away for ever: nothing is learnt of them while the cloud streams."""
    brain = Brain(27, ends=False)
    latency, source = speculation(), Source(brain, 1.0)
    for _ in range(5000):
        latency.acceptance.observe(0.5, False)
    drafted = []
    for _ in range(3 * RETRY_ANSWERS):
        source.asked.clear()
        Answer(Cloud(brain), count=3, draft=source, latency=latency).run()
        drafted.append(bool(source.asked))
    assert not any(drafted[:5]) and drafted[-1]


def test_a_round_is_sent_while_others_are_under_way() -> None:
    """Else each round would cost a round trip."""

    class Slow(Talk):
        """Tells nothing as long as the device does not wait."""

        def poll(self) -> Committed | None:
            return None

    brain = Brain(26, ends=False)
    cloud = Cloud(brain)
    cloud.open_generate_stream = lambda *_: cloud.talks.append(Slow(cloud, random.Random(0))) or cloud.talks[-1]  # type: ignore
    answer = Answer(cloud, count=60, draft=Source(brain, 1.0), latency=speculation(acceptance=0.99))
    next(iter(answer))
    rounds = cloud.talks[0].rounds
    assert rounds[0] == Round(len(PROMPT))
    assert len(rounds) > 2
    ends = [round_.base + len(round_.draft) for round_ in rounds]
    assert [round_.base for round_ in rounds[1:]] == ends[:-1]


@pytest.mark.parametrize("draft_s", [None, 0.0, 0.005])
def test_a_stream_closed_while_the_reader_paused_costs_an_opening_and_nothing_else(draft_s: float | None) -> None:
    brain = Brain(31, ends=False)
    cloud = Cloud(brain)
    draft = None if draft_s is None else Source(brain, 0.8)
    answer = Answer(cloud, count=30, draft=draft, latency=speculation(draft_s or 0.0))
    for count, _ in enumerate(answer, 1):
        if count == 7:
            cloud.talks[-1].retired = True
    assert answer.ids == brain.answer(PROMPT, 30)
    assert cloud.failures == [] and not answer.stats.degraded
    assert all(talk.closed for talk in cloud.talks)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.mark.parametrize("pause_s", [0.0, 0.02, 5.0])
def test_pauses_of_the_reader_are_no_latency(pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, measured = Clock(), list[tuple[float, int]]()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    own = WorkClock()
    timer = TokenTimer(MeasuredLatency(), own)
    monkeypatch.setattr(timer._measured, "observe", lambda seconds, tokens: measured.append((seconds, tokens)))

    def tokens() -> Iterator[Token]:
        for count in range(1, 5):
            clock.now_s += 0.05
            timer.record(count)
            yield Token(count, "cloud")

    for _ in own.pausing(tokens()):
        clock.now_s += pause_s
    assert measured == ([] if pause_s else [(pytest.approx(0.05), 1)] * 3), "after a pause replies were there before"
    assert own.paused_s == pytest.approx(4 * pause_s)
