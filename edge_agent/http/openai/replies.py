"""Answers in OpenAI's words: chunks of a stream, whole replies, usage, log probabilities. Knows nothing of HTTP.

    chat        opening chunk with the role, deltas, a closing chunk with the finish_reason
    completion  opening chunk with the echoed prompt where it was asked for, deltas, a closing chunk

Beside OpenAI's fields the last chunk and every whole reply carry `isthmus`: by which way the answer came, at what cost.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from isthmus.edge_agent.http.openai.schema import Job, models
from isthmus.edge_agent.language.detokenize import Outcome, Shown, bytes_of
from isthmus.edge_agent.language.request import Generator, Token

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer

UNLIKELY = -9999.0  # OpenAI's stand-in for a log probability of minus infinity, which JSON cannot say
Json = dict[str, Any]


class Reply(ABC):
    """The wording of one answer to a job, stateful only in what every chunk repeats."""

    chunk_object: str
    whole_object: str
    prefix: str

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._wants_logprobs = job.asks[0].top_logprobs is not None
        self._constant = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": job.model,
            "system_fingerprint": f"isthmus-{version('isthmus')}-{job.arm}",
        }

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The choice of the first chunk of answer `index`."""

    @abstractmethod
    def delta(self, index: int, shown: Sequence[Shown]) -> Json:
        """The choice of a chunk with text."""

    @abstractmethod
    def closing(self, index: int, outcome: Outcome) -> Json:
        """The choice of the last chunk of answer `index`."""

    @abstractmethod
    def choice(self, index: int, shown: Sequence[Shown], outcome: Outcome) -> Json:
        """A whole answer."""

    def chunk(self, choices: Sequence[Json], **more: object) -> Json:
        usage = {"usage": None} if self._job.include_usage else {}
        return {"object": self.chunk_object, **self._constant, "choices": list(choices), **usage, **more}

    def whole(self, choices: Sequence[Json], outcomes: Sequence[Outcome]) -> Json:
        ended = {"usage": usage(self._job, outcomes), "isthmus": how(self._job, outcomes)}
        return {"object": self.whole_object, **self._constant, "choices": list(choices), **ended}

    def last(self, choice: Json, outcomes: Sequence[Outcome]) -> list[Json]:
        """The closing chunk of the last answer, and the one with the usage where it was asked for."""
        came = how(self._job, outcomes)
        if not self._job.include_usage:
            return [self.chunk([choice], isthmus=came)]
        return [self.chunk([choice]), self.chunk([], usage=usage(self._job, outcomes), isthmus=came)]


class ChatReply(Reply):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    prefix = "chatcmpl"

    def opening(self, index: int) -> Json:
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, shown: Sequence[Shown]) -> Json:
        return self._delta(index, {"content": text_of(shown)}, self._logprobs(shown))

    def closing(self, index: int, outcome: Outcome) -> Json:
        return self._delta(index, {}, finish=outcome.finish)

    def choice(self, index: int, shown: Sequence[Shown], outcome: Outcome) -> Json:
        message = {"role": "assistant", "content": text_of(shown), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(shown),
            "finish_reason": outcome.finish,
        }

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, shown: Sequence[Shown]) -> Json | None:
        if not self._wants_logprobs:
            return None
        return {"content": [self._entry(token) for token in tokens_of(shown)], "refusal": None}

    def _entry(self, token: Token) -> Json:
        top = [self._likelihood(id, logprob) for id, logprob in token.top]
        return {**self._likelihood(token.id, token.logprob), "top_logprobs": top}

    def _likelihood(self, id: int, logprob: float | None) -> Json:
        data = bytes_of(self._tokenizer, id)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionReply(Reply):
    chunk_object = "text_completion"
    whole_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        self._sent_chars = [len(echo) for echo in job.echoes]

    def opening(self, index: int) -> Json | None:
        echo = self._job.echoes[index]
        return self._choice(index, echo) if echo else None

    def delta(self, index: int, shown: Sequence[Shown]) -> Json:
        offset = self._sent_chars[index]
        self._sent_chars[index] += len(text_of(shown))
        return self._choice(index, text_of(shown), self._logprobs(shown, offset))

    def closing(self, index: int, outcome: Outcome) -> Json:
        return self._choice(index, "", finish=outcome.finish)

    def choice(self, index: int, shown: Sequence[Shown], outcome: Outcome) -> Json:
        echo = self._job.echoes[index]
        return self._choice(index, echo + text_of(shown), self._logprobs(shown, len(echo)), outcome.finish)

    def _choice(self, index: int, text: str, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, shown: Sequence[Shown], offset: int) -> Json | None:
        if not self._wants_logprobs:
            return None
        tokens = tokens_of(shown)
        offsets = []
        for one in shown:
            if one.token:
                offsets.append(offset)
            offset += len(one.text)
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        return {self._text(id): finite(logprob) for id, logprob in reversed(((token.id, token.logprob), *token.top))}

    def _text(self, id: int) -> str:
        return bytes_of(self._tokenizer, id).decode("utf-8", "replace")


def reply_to(job: Job, tokenizer: Tokenizer) -> Reply:
    return ChatReply(job, tokenizer) if job.kind == "chat" else CompletionReply(job, tokenizer)


def text_of(shown: Sequence[Shown]) -> str:
    return "".join(one.text for one in shown)


def tokens_of(shown: Sequence[Shown]) -> list[Token]:
    return [one.token for one in shown if one.token]


def finite(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else max(logprob, UNLIKELY)


def usage(job: Job, outcomes: Sequence[Outcome]) -> Json:
    """Counts over all answers; each prompt counts once, however many answers it gets."""
    summaries = [outcome.summary for outcome in outcomes if outcome.summary]
    prompt = sum(len(ask.prompt) for ask in job.asks[:: job.n])
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


def how(job: Job, outcomes: Sequence[Outcome]) -> Json:
    """Sums over all answers; arm, reason, spans and round trip of the last. null: unknown, a stop string ended one."""
    whole = [outcome.summary for outcome in outcomes if outcome.summary]
    last = outcomes[-1].summary
    known = len(whole) == len(outcomes)
    return {
        "arm": last.arm if last else job.arm,
        "why": last.why if last else "ended at a stop string",
        "spans": [asdict(span) for span in last.spans] if last else None,
        "degraded": True if any(summary.degraded for summary in whole) else (False if known else None),
        "rounds": sum(summary.rounds for summary in whole) if known else None,
        "bytes_up": sum(summary.bytes_up for summary in whole) if known else None,
        "bytes_down": sum(summary.bytes_down for summary in whole) if known else None,
        "rtt_ms": last.rtt_s * 1000 if last and last.rtt_s is not None else None,
    }


def model_list(generator: Generator, created: int) -> Json:
    return {"object": "list", "data": [model(name, created) for name in models(generator)]}


def model(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "isthmus"}
