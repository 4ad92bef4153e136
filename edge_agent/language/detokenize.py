"""Incremental detokenization: committed tokens to text, in whole characters and without stop strings.

    tokens -> bytes -> characters (TextStream) -> held back while a stop string may have begun -> TextDelta

Text that was released is never taken back. The text does not depend on how it was divided into tokens: the stop string
that ends first applies, and of two that end together the longer one. Knows nothing about HTTP, terminals, or where
tokens come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from isthmus.edge_agent.language.request import Summary, Token
from isthmus.models.language.checkpoint.token_text import TextStream

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A token and the text that it completed. `token` None: what is left of an incomplete character at the end."""

    token: Token | None
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer ended. `summary` None: a stop string ended it, so its generator was closed before its summary."""

    finish: Literal["stop", "length"]
    tokens: int  # generated, including the one that completed a stop string
    drafted: int  # of them drafted on the device and confirmed by the cloud
    summary: Summary | None


AnswerEvent = tuple[TextDelta, ...] | Outcome


class Detokenizer:
    """The text of one answer, token by token. `stopped` is true once a stop string is complete.

    `continues`: the answer goes on where the text of the prompt ends, so its first token keeps its leading space.
    `keeps_end`: end-of-text tokens are released too, with no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, continues: bool = False, keeps_end: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._keeps_end = keeps_end
        self._stops = tuple(stop for stop in stops if stop)
        self._continues = continues
        self._stream: TextStream | None = None  # the first token says whose text it is
        self._held: list[TextDelta] = []
        self.stopped = False

    def push(self, token: Token) -> tuple[TextDelta, ...]:
        """Add a token; returns what can be released now. An end-of-text token has no text and is left out."""
        tokenizer = token.tokenizer or self._tokenizer
        if self.stopped or (token.id in tokenizer.eos_ids and not self._keeps_end):
            return ()
        if self._stream is None:
            self._stream = TextStream(0 if self._continues else tokenizer.leading_spaces)
        self._held.append(TextDelta(token, self._stream.push(bytes_of(tokenizer, token.id))))
        return self._release(final=False)

    def finish(self) -> tuple[TextDelta, ...]:
        """End the answer; returns what was held back."""
        if self.stopped:
            return ()
        rest = self._stream.finish() if self._stream else ""
        if rest and self._held:
            last = self._held.pop()
            self._held.append(TextDelta(last.token, last.text + rest))
        elif rest:
            self._held.append(TextDelta(None, rest))
        return self._release(final=True)

    def _release(self, final: bool) -> tuple[TextDelta, ...]:
        text = "".join(delta.text for delta in self._held)
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.stopped = True
            return clip(self._held, cut)
        held_chars = 0 if final else max((overlap(text, stop) for stop in self._stops), default=0)
        count = len(self._held) if final else self._count_ready(len(text) - held_chars)
        ready, self._held = tuple(self._held[:count]), self._held[count:]
        return ready

    def _count_ready(self, limit: int) -> int:
        """How many held tokens end at or before character `limit` and complete a character."""
        count = end = 0
        for index, delta in enumerate(self._held):
            end += len(delta.text)
            if end > limit:
                break
            if delta.text or (delta.token and not bytes_of(delta.token.tokenizer or self._tokenizer, delta.token.id)):
                count = index + 1
        return count


def bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes of a token; empty for ids of a padded vocabulary that the tokenizer does not have."""
    return tokenizer.token_bytes(id) if id < tokenizer.size else b""


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The start of the stop string that is complete first."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def clip(deltas: Sequence[TextDelta], end: int) -> tuple[TextDelta, ...]:
    """The deltas that start before character `end`, the last cut there."""
    clipped, start = [], 0
    for delta in deltas:
        if start < end:
            clipped.append(TextDelta(delta.token, delta.text[: end - start]))
        start += len(delta.text)
    return tuple(clipped)


def detokenize(events: Iterator[Token | Summary], detokenizer: Detokenizer) -> Iterator[AnswerEvent]:
    """The deltas of each token, often none, and last the Outcome. `events` are closed in any case.

    Raises what they raise, and RuntimeError if they end without a Summary.
    """
    tokens = drafted = 0
    try:
        for event in events:
            if isinstance(event, Summary):
                yield detokenizer.finish()
                yield Outcome("stop" if detokenizer.stopped else event.finish, event.tokens, drafted, event)
                return
            tokens += 1
            drafted += event.source == "draft"
            yield detokenizer.push(event)
            if detokenizer.stopped:
                close(events)
                yield Outcome("stop", tokens, drafted, None)
                return
        raise RuntimeError("the answer ended without a summary")
    finally:
        close(events)


def close(events: Iterator[object]) -> None:
    """Close a generator; other iterators have nothing to close."""
    if hasattr(events, "close"):
        events.close()
