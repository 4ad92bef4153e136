"""OpenAI's response objects: chunks of a stream, non-streaming responses, usage, log probabilities.

    chat        an opening chunk with the role, chunks with text, a closing chunk with the finish_reason
    completion  an opening chunk with the echoed prompt if requested, chunks with text, a closing chunk

The last chunk and every non-streaming response also have a field of ours, `isthmus`: the arm that answered, why, and
what it cost. Knows nothing about HTTP.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.language.detokenize import Outcome, TextDelta, bytes_of
from isthmus.edge_agent.language.request import Token
from isthmus.models.language.checkpoint.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot represent
Json = dict[str, Any]


class ResponseFormatter(ABC):
    """Formats the answers to one job. One instance for each job: all its chunks repeat the same id and time."""

    chunk_object: str
    response_object: str
    prefix: str

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = job.tokenizer
        self._with_logprobs = job.requests[0].top_logprobs is not None
        self._common = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": job.model,
            "system_fingerprint": f"isthmus-{version('isthmus')}-{job.arm}",
        }

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The choice object of the first chunk of choice `index`; None: there is no such chunk."""

    @abstractmethod
    def delta(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        """The choice object of a chunk with text."""

    @abstractmethod
    def closing(self, index: int, outcome: Outcome) -> Json:
        """The choice object of the last chunk of choice `index`."""

    @abstractmethod
    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        """The choice object of a non-streaming response."""

    def chunk(self, choices: Sequence[Json], **fields: object) -> Json:
        """A chunk of a stream, with further fields."""
        usage = {"usage": None} if self._job.include_usage else {}
        return {"object": self.chunk_object, **self._common, "choices": list(choices), **usage, **fields}

    def response(self, choices: Sequence[Json], outcomes: Sequence[Outcome]) -> Json:
        """A non-streaming response."""
        fields = {"usage": usage(self._job, outcomes), "isthmus": isthmus_field(self._job, outcomes)}
        return {"object": self.response_object, **self._common, "choices": list(choices), **fields}

    def last_chunks(self, choice: Json, outcomes: Sequence[Outcome]) -> list[Json]:
        """The closing chunk of the last choice, and the chunk with the usage if it was requested."""
        isthmus = isthmus_field(self._job, outcomes)
        if not self._job.include_usage:
            return [self.chunk([choice], isthmus=isthmus)]
        return [self.chunk([choice]), self.chunk([], usage=usage(self._job, outcomes), isthmus=isthmus)]


class ChatFormatter(ResponseFormatter):
    chunk_object = "chat.completion.chunk"
    response_object = "chat.completion"
    prefix = "chatcmpl"

    def opening(self, index: int) -> Json:
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        return self._delta(index, {"content": text_of(deltas)}, self._logprobs(deltas))

    def closing(self, index: int, outcome: Outcome) -> Json:
        return self._delta(index, {}, finish=outcome.finish)

    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        message = {"role": "assistant", "content": text_of(deltas), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(deltas),
            "finish_reason": outcome.finish,
        }

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, deltas: Sequence[TextDelta]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._entry(token) for token in tokens_of(deltas)], "refusal": None}

    def _entry(self, token: Token) -> Json:
        tokenizer = token.tokenizer or self._tokenizer
        top = [self._logprob(tokenizer, id, logprob) for id, logprob in token.top]
        return {**self._logprob(tokenizer, token.id, token.logprob), "top_logprobs": top}

    def _logprob(self, tokenizer: Tokenizer, id: int, logprob: float | None) -> Json:
        data = bytes_of(tokenizer, id)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionFormatter(ResponseFormatter):
    chunk_object = "text_completion"
    response_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._offsets = [len(echo) for echo in job.echoed_prompts]

    def opening(self, index: int) -> Json | None:
        echo = self._job.echoed_prompts[index]
        return self._choice(index, echo) if echo else None

    def delta(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        offset = self._offsets[index]
        self._offsets[index] += len(text_of(deltas))
        return self._choice(index, text_of(deltas), self._logprobs(deltas, offset))

    def closing(self, index: int, outcome: Outcome) -> Json:
        return self._choice(index, "", finish=outcome.finish)

    def choice(self, index: int, deltas: Sequence[TextDelta], outcome: Outcome) -> Json:
        echo = self._job.echoed_prompts[index]
        return self._choice(index, echo + text_of(deltas), self._logprobs(deltas, len(echo)), outcome.finish)

    def _choice(self, index: int, text: str, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, deltas: Sequence[TextDelta], offset: int) -> Json | None:
        if not self._with_logprobs:
            return None
        tokens = tokens_of(deltas)
        offsets = []
        for delta in deltas:
            if delta.token:
                offsets.append(offset)
            offset += len(delta.text)
        return {
            "tokens": [self._text(token, token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        found = reversed(((token.id, token.logprob), *token.top))
        return {self._text(token, id): finite(logprob) for id, logprob in found}

    def _text(self, token: Token, id: int) -> str:
        return bytes_of(token.tokenizer or self._tokenizer, id).decode("utf-8", "replace")


def response_formatter(job: Job) -> ResponseFormatter:
    return ChatFormatter(job) if job.kind == "chat" else CompletionFormatter(job)


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: Sequence[TextDelta]) -> list[Token]:
    return [delta.token for delta in deltas if delta.token]


def finite(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)


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
    }
