"""From committed tokens to text that may be shown: whole characters only, and nothing of a stop string.

    tokens -> bytes -> characters (TextStream) -> held back while a stop string may have begun -> Shown

Text once given out is never taken back. What comes out does not depend on how the text was cut into tokens: the stop
string that ends first wins, and of two that end together the longer one. Knows nothing of HTTP, of terminals, or of
where tokens come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from isthmus.edge_agent.language.request import Summary, Token
from isthmus.models.language.checkpoint.tokenizer import TextStream

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Shown:
    """A token and the text that became whole with it. Without a token: the rest of a character that stayed broken."""

    token: Token | None
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer ended. There is no `summary` where a stop string ended it, as its generator was closed before."""

    finish: Literal["stop", "length"]
    tokens: int  # generated, the one that completed a stop string among them
    drafted: int  # of them drafted on the device and confirmed by the cloud
    summary: Summary | None


Delta = tuple[Shown, ...] | Outcome


class Detokenizer:
    """The text of one answer, token by token. `stopped` once a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._stream = TextStream()
        self._held: list[Shown] = []
        self.stopped = False

    def push(self, token: Token) -> tuple[Shown, ...]:
        """What may be shown now. The end-of-text token has no text and is not shown."""
        if self.stopped or token.id in self._tokenizer.eos_ids:
            return ()
        self._held.append(Shown(token, self._stream.push(bytes_of(self._tokenizer, token.id))))
        return self._release(final=False)

    def finish(self) -> tuple[Shown, ...]:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ()
        rest = self._stream.finish()
        if rest and self._held:
            last = self._held.pop()
            self._held.append(Shown(last.token, last.text + rest))
        elif rest:
            self._held.append(Shown(None, rest))
        return self._release(final=True)

    def _release(self, final: bool) -> tuple[Shown, ...]:
        text = "".join(shown.text for shown in self._held)
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.stopped = True
            return clip(self._held, cut)
        held_chars = 0 if final else max((overlap(text, stop) for stop in self._stops), default=0)
        count = len(self._held) if final else self._ready(len(text) - held_chars)
        ready, self._held = tuple(self._held[:count]), self._held[count:]
        return ready

    def _ready(self, limit: int) -> int:
        """How many held tokens lie before `limit`; those that wait for the rest of a character wait with it."""
        count = end = 0
        for index, shown in enumerate(self._held):
            end += len(shown.text)
            if end > limit:
                break
            if shown.text or (shown.token and not bytes_of(self._tokenizer, shown.token.id)):
                count = index + 1
        return count


def bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    """What a token stands for. A model can have rows beyond its vocabulary, which stand for nothing."""
    return tokenizer.token_bytes(id) if id < tokenizer.size else b""


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` may begin."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def clip(held: Sequence[Shown], cut: int) -> tuple[Shown, ...]:
    """The tokens that begin before `cut`, the last with only its part before it."""
    kept, start = [], 0
    for shown in held:
        if start < cut:
            kept.append(Shown(shown.token, shown.text[: cut - start]))
        start += len(shown.text)
    return tuple(kept)


def read(events: Iterator[Token | Summary], text: Detokenizer) -> Iterator[Delta]:
    """A step for each token, often an empty one, and last the Outcome. `events` are closed in any case.

    Raises what they raise, and RuntimeError when they end without a Summary.
    """
    tokens = drafted = 0
    try:
        for event in events:
            if isinstance(event, Summary):
                yield text.finish()
                yield Outcome("stop" if text.stopped else event.finish, event.tokens, drafted, event)
                return
            tokens += 1
            drafted += event.source == "draft"
            yield text.push(event)
            if text.stopped:
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
