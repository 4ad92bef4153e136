"""vLLM's /v1/completions with token ids. Pure.

A draft is verified by one request for the log-probabilities of the whole prompt. vLLM then does not read its cache of
prefixes, so that a round takes as long as the whole text does. `skip_reading_prefix_cache: false`, which would read it,
is never sent: vLLM 0.32 on a CPU loses its engine process over it.
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
    numeral,
    own,
    read_event,
    token_id,
)
from isthmus.cloud_service.language.engines.dialect import MIN_TOP, PENALTIES, Call, StreamReader, penalty_fields
from isthmus.cloud_service.language.engines.protocol import Choice
from isthmus.models.errors import EngineFault
from isthmus.models.messages import GREEDY, Grammar, Logprobs, Processor, Sampling

HEALTH = Call("/health")
COMPLETIONS = "/v1/completions"
ID_PREFIX = "token_id:"
# What the model's makers recommend is not what was asked for: by itself the server would take it from the checkpoint.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class VllmDialect:
    """`vocab`, `end_ids`: of the tokenizer; an answer ends with one of the latter and nothing else."""

    logprobs = True
    processors: tuple[Processor, ...] = (*PENALTIES, "json_object", "json_schema", "regex")

    def __init__(self, vocab: int, end_ids: Iterable[int], *, scores: bool = True, ping: Call = HEALTH) -> None:
        self.scores, self.ping = scores, ping
        self._vocab, self._end_ids = vocab, sorted(end_ids)

    def tokens_call(self, model: str, text: str) -> Call | None:
        body = self._body(model, text, 1, GREEDY, None)
        return Call(COMPLETIONS, {**body, "add_special_tokens": False})

    def read_tokens(self, answer: dict[str, Any]) -> list[int]:
        ids = listed(only_choice(answer).get("prompt_token_ids"), "tokens of the prompt")
        return [token_id(value, ANY_ID) for value in ids]

    def stream_call(
        self, model: str, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> tuple[Call, StreamReader]:
        body = {**self._body(model, list(ids), limit, sampling, top), "stream": True}
        return Call(COMPLETIONS, body), VllmStreamReader(self._vocab, top)

    def score_call(self, model: str, ids: Sequence[int], start: int, top: int | None) -> Call:
        count = max(MIN_TOP, top or 0)
        return Call(COMPLETIONS, {**self._body(model, list(ids), 1, GREEDY, count), "prompt_logprobs": count})

    def read_scores(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int | None) -> list[Choice]:
        choice = only_choice(answer)
        rows = listed(choice.get("prompt_logprobs"), "log-probabilities of the prompt", len(ids))
        last = read_choices(choice, self._vocab, top)
        if len(last) != 1:
            raise EngineFault(f"the engine sent {len(last)} tokens after a text, expected 1")
        return [*(self._scored(row, top) for row in rows[start:]), *last]

    def read_prompt(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        rows = listed(only_choice(answer).get("prompt_logprobs"), "log-probabilities of the prompt", len(ids))
        return [own(self._values(row), id_, top) for row, id_ in zip(rows[start:], ids[start:], strict=True)]

    def _scored(self, row: Any, top: int | None) -> Choice:
        return chosen(self._values(row), top)

    def _values(self, row: Any) -> list[tuple[int, float]]:
        """Of the likeliest tokens of a position and the text's own."""
        return [
            (numeral(key, self._vocab), logprob(mapping(entry, "log-probability").get("logprob")))
            for key, entry in mapping(row, "log-probabilities of a position").items()
        ]

    def _body(
        self, model: str, prompt: list[int] | str, limit: int, sampling: Sampling, top: int | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            "ignore_eos": True,  # of the checkpoint: the tokenizer's are in stop_token_ids
            "stop_token_ids": self._end_ids,
            "skip_special_tokens": False,
            **NEUTRAL,
            **penalty_fields(sampling),
        }
        if sampling.grammar is not None:
            body["structured_outputs"] = structured(sampling.grammar)
        if sampling.temperature > 0:
            body["seed"] = sampling.seed
        if top is not None:
            body.update(logprobs=top, return_tokens_as_token_ids=True)
        return body


def structured(grammar: Grammar) -> dict[str, Any]:
    """A grammar as vLLM reads it."""
    match grammar.kind:
        case "regex":
            return {"regex": grammar.text}
        case "json_schema":
            return {"json": grammar.text}
        case _:
            return {"json_object": True}


class VllmStreamReader:
    """Events of a streamed completion."""

    def __init__(self, vocab: int, top: int | None) -> None:
        self.finished = False
        self._vocab, self._top = vocab, top

    def read(self, event: bytes) -> list[Choice]:
        if (answer := read_event(event)) is None:
            return []
        choices = answer.get("choices")
        if choices == []:  # usage
            return []
        choice = only_choice(answer)
        if choice.get("finish_reason") in ("error", "abort"):
            raise EngineFault("the engine gave up an answer in the middle")
        self.finished = self.finished or choice.get("finish_reason") is not None
        return read_choices(choice, self._vocab, self._top)


def only_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The completion of the one prompt."""
    return mapping(listed(answer.get("choices"), "completions", 1)[0], "completion")


def read_choices(choice: dict[str, Any], vocab: int, top: int | None) -> list[Choice]:
    """Generated tokens with, if `top` is not None, their log-probabilities."""
    ids = [token_id(value, vocab) for value in listed(choice.get("token_ids"), "tokens")]
    if top is None:
        return [Choice(id_) for id_ in ids]
    found = mapping(choice.get("logprobs"), "log-probabilities")
    values = listed(found.get("token_logprobs"), "log-probabilities of tokens", len(ids))
    rows = listed(found.get("top_logprobs"), "lists of likely tokens", len(ids))
    return [
        Choice(id_, Logprobs(logprob(value), read_top(row, vocab, top)))
        for id_, value, row in zip(ids, values, rows, strict=True)
    ]


def read_top(row: Any, vocab: int, top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of a position, written as `token_id:17`."""
    entries = mapping(row or {}, "likely tokens").items()
    values = [(numeral(key.removeprefix(ID_PREFIX), vocab), logprob(value)) for key, value in entries]
    return tuple(likeliest(values)[:top])
