"""What a session in the cloud promises apart from any arm; failover itself is in arms/test_verify.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.language.charges import Tariff
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import HOUR_S, Budget
from isthmus.models.errors import AnswerCancelled, DeadlineExceeded, LinkDown, OverBudget
from isthmus.models.messages import Committed, Round, Sampling
from isthmus.protos.wire_session import checksum
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, bound

PROMPT = tuple(1 + index % 9 for index in range(40))
BRAIN = Brain(1, ends=False)


def session(*clouds: Cloud) -> tuple[RemoteSession, Replicas, AnswerSequence, GenerationStats]:
    replicas = Replicas(clouds, bound(), 0.05)  # type: ignore[arg-type]
    sequence, stats = AnswerSequence(GenerationRequest(PROMPT, 8, "cloud"), ENDS), GenerationStats()
    return RemoteSession(replicas, sequence, stats, token_opening(sequence, 3)), replicas, sequence, stats


def test_an_opening_names_the_session_and_brings_what_the_replica_lacks() -> None:
    request = GenerationRequest(PROMPT, 8, "cloud", Sampling(0.5, seed=3), top_logprobs=2)
    opening = token_opening(AnswerSequence(request, ENDS), 3)(b"themodel", b"name", 35)
    assert (opening.model, opening.session, opening.start, opening.tokens) == (b"themodel", b"name", 35, PROMPT[35:])
    assert opening.crc32 == checksum(PROMPT), "of all tokens, whoever has them"
    assert (opening.sampling, opening.logprobs, opening.prefill_layers) == (request.sampling, 2, 3)


def test_a_stream_that_is_open_is_used_again() -> None:
    cloud = Cloud(BRAIN)
    remote, _, sequence, _ = session(cloud)
    assert remote.prepare() and not remote.connected
    for _ in range(3):
        remote.open()
        remote.send(Round(len(sequence)))
        committed = remote.receive()
        assert committed.tokens == (BRAIN.next(sequence.tokens),)
        sequence.append(committed.tokens[0])
        remote.held = len(sequence)
    (talk,) = cloud.talks
    assert [opening.start for opening in talk.openings] == [0, 41, 42]
    remote.close()
    assert talk.closed


def test_a_wait_for_the_cloud_ends_when_the_answer_is_given_up() -> None:
    cloud = Cloud(BRAIN, fault=lambda answer: DeadlineExceeded("no answer yet"))
    cancelled = threading.Event()
    sequence = AnswerSequence(GenerationRequest(PROMPT, 8, "cloud"), ENDS)
    replicas, opening = Replicas([cloud], bound(), 0.05), token_opening(sequence, 3)  # type: ignore[list-item]
    remote = RemoteSession(replicas, sequence, GenerationStats(), opening, b"", cancelled)
    assert remote.prepare()
    remote.open()
    remote.send(Round(len(sequence)))
    cancelled.set()
    with pytest.raises(AnswerCancelled):
        remote.receive()


def test_without_a_replica_nothing_can_be_prepared() -> None:
    remote, _, _, _ = session(Cloud(BRAIN, alone=10))
    assert not remote.prepare() and remote.answered


def test_a_failure_of_a_prepared_stream_is_its_own_replicas() -> None:
    """Another one may be preferred by then."""
    first, second = Cloud(BRAIN, "a", fault=lambda answer: LinkDown("gone")), Cloud(BRAIN, "b")
    remote, replicas, sequence, stats = session(first, second)
    assert remote.prepare()
    remote.open()
    remote.send(Round(len(sequence)))
    replicas._links.reverse()

    def one() -> Iterator[Token]:
        if not remote.connected:
            remote.open()
            remote.send(Round(len(sequence)))
        (id_,) = remote.receive().tokens
        sequence.append(id_)
        yield Token(id_, "cloud")

    (token,) = remote.tokens(one, None, lambda: sequence.generated > 0)
    assert token.id == BRAIN.next(PROMPT)
    assert (first.failures, second.failures) == (["gone"], []) and stats.why == "gone; went on with what was committed"


def test_a_closed_session_is_remembered_once() -> None:
    cloud = Cloud(BRAIN)
    remote, replicas, sequence, _ = session(cloud)
    remote.prepare()
    remote.open()
    remote.held = len(sequence)
    remote.close()
    remote.close()
    one, other = replicas.acquire((*PROMPT, 1)), replicas.acquire((*PROMPT, 1))
    assert one.held == len(PROMPT) and other.held == 0


def test_bytes_are_counted_when_a_stream_ends() -> None:
    cloud = Cloud(BRAIN)
    remote, _, sequence, stats = session(cloud)
    remote.prepare()
    remote.open()
    remote.send(Round(len(sequence)))
    remote.receive()
    assert stats.bytes_up == 0
    remote.disconnect()
    remote.disconnect()
    assert (stats.bytes_up, stats.opening_bytes, stats.bytes_down, stats.rtt_s) == (2, 1, 1, cloud.rtt_s)


def test_what_is_committed_by_the_fallback_is_marked() -> None:
    cloud = Cloud(BRAIN, away=2, fault=lambda answer: LinkDown("gone") if answer == 0 else None)
    remote, _, sequence, stats = session(cloud)
    marks = []

    def one() -> Iterator[Token]:
        remote.open()
        remote.send(Round(len(sequence)))
        (id_,) = remote.receive().tokens
        sequence.append(id_)
        remote.held = len(sequence)
        yield Token(id_, "cloud")

    for _ in remote.tokens(one, lambda text: Token(BRAIN.next(text), "edge"), lambda: sequence.generated == 4):
        marks.append(stats.fell_back)
    assert marks == [True, True, False, False] and stats.degraded
    assert sequence.tokens == [*PROMPT, *BRAIN.answer(PROMPT, 4)]


def test_patience_ends_with_a_replica_that_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    remote, _, sequence, _ = session(Cloud(BRAIN, living=False))
    remote.prepare()
    remote.open()
    remote.send(Round(len(sequence)))

    def late(talk: object) -> Committed:
        raise DeadlineExceeded("slow")

    monkeypatch.setattr("tests.unit.edge_agent.language.scripted_cloud.Talk.receive", late)
    with pytest.raises(LinkDown, match="does not answer any more"):
        remote.receive()


@pytest.mark.parametrize("alone", [True, False], ids=["device goes on", "no device"])
def test_when_a_budget_is_used_up_the_device_goes_on_or_the_answer_fails(alone: bool) -> None:
    """Three of thirty calls an hour may be made at once; the cloud is not at fault."""
    cloud = Cloud(BRAIN)
    replicas = Replicas([cloud], bound(), 0.05)  # type: ignore[list-item]
    sequence, stats = AnswerSequence(GenerationRequest(PROMPT, 8, "cloud"), ENDS), GenerationStats()
    ledger = Ledger([Budget("calls", 30, HOUR_S)])
    tariff = Tariff(ledger, open_profile("wifi"))
    remote = RemoteSession(replicas, sequence, stats, token_opening(sequence, 3), tariff=tariff)

    def one_by_one() -> Iterator[Token]:
        while sequence.generated < 8:
            remote.open()
            remote.send(Round(len(sequence)))
            sequence.append(remote.receive().tokens[0])
            remote.held = len(sequence)
            yield Token(sequence.tokens[-1], "cloud")

    def device(tokens: Sequence[int]) -> Token:
        return Token(BRAIN.next(tokens), "edge")

    answer = remote.tokens(one_by_one, device if alone else None, lambda: sequence.generated == 8)
    if alone:
        assert [token.source for token in answer] == ["cloud"] * 3 + ["edge"] * 5
        assert stats.degraded and "the budget of calls has" in stats.why
    else:
        with pytest.raises(OverBudget, match="budget of calls"):
            list(answer)
        assert sequence.generated == 3
    remote.close()
    assert cloud.failures == [] and ledger.totals.spent.calls == 3
    assert [len(talk.rounds) for talk in cloud.talks] == [3, *[0] * (len(cloud.talks) - 1)]
