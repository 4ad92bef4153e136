"""Any server that calls itself compatible with OpenAI: /v1/completions with text, or with token ids where it can. Pure.

    ids ── decode ──> text ··· pieces of text ── longest tokens ──> ids

A probe asks for token ids and for log-probabilities of the prompt, as vLLM has them. A server that sends both can
verify drafts; for one that does not, ids become text, and the text that it sends becomes ids: of any text the same,
though not always those that the model chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.cloud_service.language.engines.answers import read_event
from isthmus.cloud_service.language.engines.dialect import (
    MODELS,
    PENALTIES,
    Call,
    Dialect,
    StreamReader,
    penalty_fields,
)
from isthmus.cloud_service.language.engines.protocol import Choice
from isthmus.cloud_service.language.engines.vllm import COMPLETIONS, VllmDialect, only_choice
from isthmus.models.errors import EngineFault
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import Logprobs, Sampling

LIST = Call(MODELS)
PROBE = "One, two, three"


class OpenAiProbe:
    """Tries what vLLM can do; `tokenizer`: the model's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(PROBE)

    def call(self, model: str) -> Call:
        return self._with_ids(scores=True).score_call(model, self._ids, 1, None)

    def dialect(self, answer: dict[str, Any] | None) -> Dialect:
        choice = {} if answer is None else only_choice(answer)
        if answer is None or not choice.get("token_ids"):
            return TextDialect(self._tokenizer)
        dialect = self._with_ids(scores=True)
        try:
            dialect.read_scores(answer, self._ids, 1, None)
        except EngineFault:
            return self._with_ids(scores=False)
        return dialect

    def _with_ids(self, scores: bool) -> VllmDialect:
        return VllmDialect(self._tokenizer.size, self._tokenizer.eos_ids, scores=scores, ping=LIST)


class TextDialect:
    """Speaks in text."""

    scores = logprobs = False
    processors = PENALTIES  # of grammars completions have none that all servers agree on
    ping = LIST

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = LongestTokens(tokenizer)

    def tokens_call(self, model: str, text: str) -> Call | None:
        return None

    def read_tokens(self, answer: dict[str, Any]) -> list[int]:
        raise EngineFault("the engine does not say how it tokenizes")

    def score_call(self, model: str, ids: Sequence[int], start: int, top: int | None) -> Call:
        raise EngineFault("the engine does not say how likely the tokens of a text are")

    def read_scores(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int | None) -> list[Choice]:
        raise EngineFault("the engine does not say how likely the tokens of a text are")

    def read_prompt(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        raise EngineFault("the engine does not say how likely the tokens of a text are")

    def stream_call(
        self, model: str, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> tuple[Call, StreamReader]:
        prompt, rest = split_characters(self._tokenizer.written(ids))
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            **penalty_fields(sampling),
        }
        if sampling.temperature > 0:
            body["seed"] = sampling.seed
        return Call(COMPLETIONS, body), TextReader(self._tokens, min(self._tokenizer.eos_ids), limit, rest)


class TextReader:
    """Events of a completion whose text becomes tokens; an answer that ends by itself ends with `end_id`."""

    def __init__(self, tokens: LongestTokens, end_id: int, limit: int, rest: bytes) -> None:
        """`rest`: the first bytes of a character that the prompt ended within, and that the answer begins with."""
        self.finished = False
        self._tokens, self._end_id = tokens, end_id
        self._left, self._rest = limit, rest

    def read(self, event: bytes) -> list[Choice]:
        if (answer := read_event(event)) is None:
            return []
        if answer.get("choices") == []:  # usage
            return []
        choice = only_choice(answer)
        text = choice.get("text")
        if not isinstance(text, str):
            raise EngineFault("the engine sent a completion without text")
        reason = choice.get("finish_reason")
        ids = self._tokens.ids_of(self._new_bytes(text)[: self._left * self._tokens.longest])
        self.finished = self.finished or reason is not None
        if reason == "stop":
            ids.append(self._end_id)
        ids = ids[: self._left]
        self._left -= len(ids)
        return [Choice(id_) for id_ in ids]

    def _new_bytes(self, text: str) -> bytes:
        raw = text.encode(errors="replace")
        if raw and self._rest:
            if not raw.startswith(self._rest):
                raise EngineFault("the engine went on with another character than was begun")
            raw, self._rest = raw[len(self._rest) :], b""
        return raw


class LongestTokens:
    """Tokens whose bytes are a text: at each place the longest one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids: dict[bytes, int] = {}
        for id_ in range(tokenizer.size):
            self._ids.setdefault(tokenizer.token_bytes(id_), id_)
        self._ids.pop(b"", None)
        self.longest = max(map(len, self._ids), default=1)

    def ids_of(self, raw: bytes) -> list[int]:
        """Bytes that no token has are left out, as an encoder does."""
        ids, start = [], 0
        while start < len(raw):
            for size in range(min(self.longest, len(raw) - start), 0, -1):
                if (id_ := self._ids.get(raw[start : start + size])) is not None:
                    ids.append(id_)
                    break
            else:
                size = 1
            start += size
        return ids


def split_characters(raw: bytes) -> tuple[str, bytes]:
    """The text of UTF-8 without a character that its last bytes only begin, and those bytes."""
    for size in range(1, min(4, len(raw) + 1)):
        lead = raw[-size]
        if 0xC2 <= lead <= 0xF4:  # begins a character of 2 to 4 bytes
            needed = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            cut = len(raw) - size if size < needed else len(raw)
            return raw[:cut].decode(errors="replace"), raw[cut:]
        if lead < 0x80:
            break
    return raw.decode(errors="replace"), b""
