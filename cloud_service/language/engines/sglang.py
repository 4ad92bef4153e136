"""SGLang's native /generate with token ids. Pure.

A draft is verified with `logprob_start_len`: only what follows it is computed, the rest comes from the radix cache.
The first entry of the input's log-probabilities is of the token at `logprob_start_len`, and always empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from isthmus.cloud_service.language.engines.answers import (
    ANY_ID,
    chosen,
    likeliest,
    listed,
    logprob,
    mapping,
    read_event,
    token_id,
)
from isthmus.cloud_service.language.engines.dialect import MIN_TOP, PENALTIES, Call, StreamReader, penalty_fields
from isthmus.cloud_service.language.engines.protocol import Choice
from isthmus.models.errors import EngineFault
from isthmus.models.messages import GREEDY, Logprobs, Processor, Sampling

GENERATE = "/generate"
ANY_OBJECT = '{"type": "object"}'  # a schema


class SglangDialect:
    """`vocab`, `end_ids`: of the tokenizer."""

    scores = logprobs = True
    processors: tuple[Processor, ...] = (*PENALTIES, "json_object", "json_schema", "regex")
    ping = Call("/health")

    def __init__(self, vocab: int, end_ids: Iterable[int]) -> None:
        self._vocab, self._end_ids = vocab, sorted(end_ids)

    def tokens_call(self, model: str, text: str) -> Call | None:
        body = {"text": text, "sampling_params": self._sampling(GREEDY, 1)}
        return Call(GENERATE, {**body, "return_logprob": True, "logprob_start_len": 0})

    def read_tokens(self, answer: dict[str, Any]) -> list[int]:
        rows = listed(meta_of(answer).get("input_token_logprobs"), "tokens of the prompt")
        return [token_id(parts(row)[1], ANY_ID) for row in rows]

    def stream_call(
        self, model: str, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> tuple[Call, StreamReader]:
        body = {**self._body(ids, limit, sampling, top), "stream": True}
        return Call(GENERATE, body), SglangStreamReader(self._vocab, top)

    def score_call(self, model: str, ids: Sequence[int], start: int, top: int | None) -> Call:
        body = self._body(ids, 1, GREEDY, max(MIN_TOP, top or 0))
        return Call(GENERATE, {**body, "logprob_start_len": start - 1})

    def read_scores(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int | None) -> list[Choice]:
        meta = meta_of(answer)
        count = len(ids) - start + 1
        rows = listed(meta.get("input_top_logprobs"), "lists of likely tokens", count)
        last = read_choices(answer, meta, self._vocab, top)
        if len(last) != 1:
            raise EngineFault(f"the engine sent {len(last)} tokens after a text, expected 1")
        return [*(chosen(read_top(row, self._vocab), top) for row in rows[1:]), *last]

    def read_prompt(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        meta, count = meta_of(answer), len(ids) - start + 1
        rows = listed(meta.get("input_top_logprobs"), "lists of likely tokens", count)
        values = listed(meta.get("input_token_logprobs"), "log-probabilities of the prompt", count)
        found = [read_top([value], self._vocab)[0] for value in values[1:]]
        if [id_ for id_, _ in found] != list(ids[start:]):
            raise EngineFault("the engine sent log-probabilities of another text")
        return [
            Logprobs(value, tuple(read_top(row, self._vocab)[:top]))
            for row, (_, value) in zip(rows[1:], found, strict=True)
        ]

    def _body(self, ids: Sequence[int], limit: int, sampling: Sampling, top: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {"input_ids": list(ids), "sampling_params": self._sampling(sampling, limit)}
        if top is not None:
            body.update(return_logprob=True, top_logprobs_num=top)
        return body

    def _sampling(self, sampling: Sampling, limit: int) -> dict[str, Any]:
        params: dict[str, Any] = {
            "max_new_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self._end_ids,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            **penalty_fields(sampling),
        }
        if (grammar := sampling.grammar) is not None:
            kind = "regex" if grammar.kind == "regex" else "json_schema"
            params[kind] = grammar.text or ANY_OBJECT
        if sampling.temperature > 0:
            params["sampling_seed"] = sampling.seed
        return params


class SglangStreamReader:
    """Events of a stream, which carry all of the answer's tokens or, with --incremental-streaming-output, the new."""

    def __init__(self, vocab: int, top: int | None) -> None:
        self.finished = False
        self._vocab, self._top = vocab, top
        self._seen = 0

    def read(self, event: bytes) -> list[Choice]:
        if (answer := read_event(event)) is None:
            return []
        meta = meta_of(answer)
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") in ("abort", "error"):
            raise EngineFault("the engine gave up an answer in the middle")
        self.finished = self.finished or reason is not None
        total = meta.get("completion_tokens")
        if type(total) is not int or total < self._seen:
            raise EngineFault("the engine does not count the tokens of an answer")
        choices = read_choices(answer, meta, self._vocab, self._top, total - self._seen)
        self._seen = total
        return choices


def meta_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What the answer says of itself."""
    return mapping(answer.get("meta_info"), "meta_info")


def read_choices(
    answer: dict[str, Any], meta: dict[str, Any], vocab: int, top: int | None, new: int | None = None
) -> list[Choice]:
    """The last `new` generated tokens, None: all. With log-probabilities if `top` is not None."""
    ids = listed(answer.get("output_ids"), "tokens")
    new = len(ids) if new is None else new
    fresh = [token_id(value, vocab) for value in newest(ids, "tokens", new)]
    if top is None:
        return [Choice(id_) for id_ in fresh]
    own = newest(listed(meta.get("output_token_logprobs"), "log-probabilities of tokens"), "log-probabilities", new)
    rows = (
        newest(listed(meta.get("output_top_logprobs"), "lists of likely tokens"), "lists", new) if top else [[]] * new
    )
    return [
        Choice(id_, Logprobs(logprob(parts(value)[0]), tuple(read_top(row, vocab)[:top])))
        for id_, value, row in zip(fresh, own, rows, strict=True)
    ]


def newest(values: list[Any], what: str, count: int) -> list[Any]:
    """The last `count` entries."""
    if len(values) < count:
        raise EngineFault(f"the engine sent {len(values)} {what}, expected at least {count}")
    return values[len(values) - count :]


def read_top(row: Any, vocab: int) -> list[tuple[int, float]]:
    """The likeliest tokens of a position: triples of log-probability, id and text."""
    pairs = [parts(entry) for entry in listed(row, "likely tokens")]
    return likeliest((token_id(id_, vocab), logprob(value)) for value, id_ in pairs)


def parts(entry: Any) -> tuple[Any, Any]:
    """Log-probability and id, which a text follows."""
    found = listed(entry, "parts of a token")
    if len(found) < 2:
        raise EngineFault("the engine sent a token without its id")
    return found[0], found[1]
