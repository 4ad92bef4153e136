from __future__ import annotations

from isthmus.edge_agent.language.request import GenerationRequest, Span
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import REQUESTED, GenerationStats
from isthmus.models.messages import Committed, Processed


def test_tokens_of_one_arm_in_a_row_are_a_span_with_its_first_reason() -> None:
    stats = GenerationStats()
    for arm, why in (("edge", "a"), ("edge", "b"), ("cloud", "c"), ("edge", "d")):
        stats.count_token(arm, why)  # type: ignore[arg-type]
    assert stats.spans == [Span("edge", 2, "a"), Span("cloud", 1, "c"), Span("edge", 1, "d")]


def test_the_first_reply_after_an_opening_has_read_the_prompt() -> None:
    stats = GenerationStats()
    stats.count_reply(Committed(4, tokens=(1,), passes=5, queue_s=0.1, compute_s=0.2), first=True)
    stats.count_reply(Committed(5, tokens=(1,), passes=2, extension=True), first=False)
    assert (stats.prefill_passes, stats.passes, stats.rounds) == (4, 3, 1)
    assert round(stats.cloud_s, 6) == 0.3


def test_what_the_cloud_processed_adds_up() -> None:
    stats = GenerationStats()
    for processed in (Processed(5, 50), Processed(2, 20, 1)):
        stats.count_cost(Committed(4, processed=processed))
    assert stats.cloud == Processed(7, 70, 1)


def test_what_was_held_counts_once_and_never_more_than_the_prompt() -> None:
    stats = GenerationStats()
    stats.count_cost(Committed(4, held=9))
    stats.count_cost(Committed(4, held=100))
    sequence = AnswerSequence(GenerationRequest((1, 2, 3, 4), 3, "cloud"), frozenset())
    assert stats.cached == 9 and stats.summary(sequence).cached == 4


def test_a_problem_is_said_in_place_of_the_reason() -> None:
    stats = GenerationStats()
    assert stats.why == REQUESTED
    stats.reason = "cheapest"
    assert stats.why == "cheapest"
    stats.problem = "gone"
    stats.degrade("no cloud answers")
    assert stats.why == "gone" and stats.degraded


def test_without_an_error_before_it_says_why_it_is_degraded() -> None:
    stats = GenerationStats(reason="cheapest")
    stats.degrade("no cloud answers")
    assert stats.why == "no cloud answers"


def test_a_summary_says_what_was_counted() -> None:
    sequence = AnswerSequence(GenerationRequest((1, 2), 3, "verify"), frozenset({7}))
    sequence.append(7)
    stats = GenerationStats(accepted=1, rejected=2, rounds=3, bytes_up=4, bytes_down=5, rtt_s=0.5, opening_bytes=6)
    summary = stats.summary(sequence)
    assert (summary.finish, summary.prompt_tokens, summary.tokens, summary.arm) == ("stop", 2, 1, "verify")
    assert (summary.accepted, summary.rejected, summary.rounds, summary.rtt_s) == (1, 2, 3, 0.5)
    assert (summary.bytes_up, summary.bytes_down, summary.opening_bytes) == (4, 5, 6)
