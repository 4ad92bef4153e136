"""What the answers to a job cost: OpenAI's usage object, and a field of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.language.detokenize import Outcome
from isthmus.models.messages import Processed

Json = dict[str, Any]


def usage(job: Job, outcomes: Sequence[Outcome]) -> Json:
    """OpenAI's usage object over all choices. A prompt counts once, however many choices it has."""
    summaries = [outcome.summary for outcome in outcomes if outcome.summary]
    prompt = sum(len(request.prompt) for request in job.requests[:: job.n])
    completion = sum(outcome.tokens for outcome in outcomes)
    cached = sum(outcome.summary.cached for outcome in outcomes[:: job.n] if outcome.summary)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": sum(
                outcome.summary.accepted if outcome.summary else outcome.drafted for outcome in outcomes
            ),
            "rejected_prediction_tokens": sum(summary.rejected for summary in summaries),
        },
    }


def isthmus_field(job: Job, outcomes: Sequence[Outcome]) -> Json:
    """Costs are sums over all choices; arm, why, spans and round trip are those of the last one.

    null: not known, because a stop string ended a choice before its summary.
    """
    summaries = [outcome.summary for outcome in outcomes if outcome.summary]
    last = outcomes[-1].summary
    known = len(summaries) == len(outcomes)
    return {
        "arm": last.arm if last else job.arm,
        "why": last.why if last else "ended at a stop string",
        "spans": [asdict(span) for span in last.spans] if last else None,
        "degraded": True if any(summary.degraded for summary in summaries) else (False if known else None),
        "rounds": sum(summary.rounds for summary in summaries) if known else None,
        "bytes_up": sum(summary.bytes_up for summary in summaries) if known else None,
        "bytes_down": sum(summary.bytes_down for summary in summaries) if known else None,
        "rtt_ms": last.rtt_s * 1000 if last and last.rtt_s is not None else None,
        "device": processed_field([summary.device for summary in summaries]) if known else None,
        "cloud": processed_field([summary.cloud for summary in summaries]) if known else None,
    }


def processed_field(processed: Iterable[Processed]) -> Json:
    """What a side's model computed. null: a count that an engine does not tell."""
    total = sum(processed, Processed())
    return {**asdict(total), "flops": total.flops if total.flops or not total.tokens else None}
