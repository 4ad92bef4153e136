"""One session's text in the cloud, and how a round makes it grow. No queue, no thread, no network.

tokens (committed)  t0 t1 ... t(L-1)
draft               from position `base`: what it shares with the committed is skipped, another text makes it stale
rows fed            tokens[cache.length:] + draft; the row of position p decides the token of position p + 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.models.errors import InvalidInput
from isthmus.models.language.sampling import Floats, choose, logprobs
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, exact_last
from isthmus.models.messages import Committed, Logprobs, Opening, Round


@dataclass
class ScheduledWork:
    """A round under way; `matched` tokens of its draft are confirmed so far."""

    base: int
    skipped: int  # tokens from `base` on that were sent, and committed already when the round began
    draft: tuple[int, ...]  # the others
    extend: int
    extension: bool
    arrived_s: float
    started_s: float | None = None
    matched: int = 0
    compute_s: float = 0.0
    passes: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    states: tuple[bytes, ...] = ()  # of the draft, in a hand-off
    decided: frozenset[int] = frozenset()  # indices of those that have decided a token before

    def committed(self, tokens: tuple[int, ...], accepted: int = 0) -> Committed:
        """Its answer, with what it cost."""
        return Committed(
            base=self.base,
            accepted=accepted,
            tokens=tokens,
            extension=self.extension,
            queue_s=(self.started_s or self.arrived_s) - self.arrived_s,
            compute_s=self.compute_s,
            passes=self.passes,
            logprobs=tuple(self.logprobs),
        )


class TokenSequence:
    """A session's committed tokens and the cache of their keys and values (None: evicted, to be made again)."""

    def __init__(self, tokens: Sequence[int], opening: Opening, eos_ids: frozenset[int], context: int) -> None:
        self.tokens = list(tokens)
        self.prefill_layers = opening.prefill_layers
        guessed = len(tokens) - exact_last(len(tokens)) if opening.prefill_layers else 0
        self._guessed = range(EXACT_FIRST, max(guessed, EXACT_FIRST))  # may skip the upper layers
        self.cache: KVCache | None = None
        self.work: ScheduledWork | None = None
        self._sampling, self._logprobs = opening.sampling, opening.logprobs
        self._eos_ids = eos_ids
        self._context = context
        self._ended = False

    def check(self, round_: Round) -> None:
        """Raises InvalidInput for a round that this session can never take."""
        if round_.states:
            raise InvalidInput("a round of states in a session that was opened without a hand-off")

    def begin(self, round_: Round, arrived_s: float) -> Committed | None:
        """Take up a round. A stale one, or one with nothing left to decide, is answered at once.

        Behind a stale one too the cloud may go on by itself.
        """
        length = len(self.tokens)
        known = self.tokens[round_.base : round_.base + len(round_.draft)]
        if round_.base > length or list(round_.draft[: len(known)]) != known:
            if round_.extend and not self.finished:
                self.work = ScheduledWork(length, 0, (), round_.extend - 1, True, arrived_s)
            return Committed(length)
        if self.finished:
            return Committed(round_.base, len(known), tuple(self.tokens[round_.base + len(known) :]))
        draft = round_.draft[len(known) :][: self._context - length - 1]
        self.work = ScheduledWork(round_.base, len(known), draft, round_.extend, False, arrived_s)
        return None

    @property
    def finished(self) -> bool:
        """Nothing can follow: an end-of-text token was committed, or the context is full."""
        return self._ended or len(self.tokens) >= self._context

    @property
    def lost(self) -> bool:
        """Never: what is gone of the state is made again from the tokens."""
        return False

    def forget(self) -> None:
        """The state is gone."""
        self.cache = None

    @property
    def reusable(self) -> int:
        """Tokens whose state it can take over from another session: one row at least decides what follows."""
        return len(self.tokens) - 1

    @property
    def extent(self) -> int:
        """Tokens whose state there may be when the round at hand has ended."""
        return len(self.tokens) + (len(self.work.draft) if self.work else 0)

    @property
    def rows(self) -> int:
        """Rows of the same kind that the round could still use."""
        if self.work is None:
            return 0
        ends = (self._guessed.start, self._guessed.stop) if self._guessed else ()
        return next((end for end in ends if self._held < end), self.extent) - self._held

    @property
    def guesses(self) -> bool:
        """Whether the rows that come next decide nothing, and may skip the layers behind `prefill_layers`."""
        return self._held in self._guessed

    def next_ids(self, count: int) -> list[int]:
        """The next `count` tokens to feed."""
        assert self.work is not None and self.cache is not None
        start = self.cache.length
        return [*self.tokens, *self.work.draft][start : start + count]

    def decides(self, count: int) -> bool:
        """Whether the next `count` rows decide a token."""
        assert self.cache is not None
        return self.cache.length + count >= len(self.tokens)

    def settle(self, logits_NV: Floats | None, count: int, seconds: float) -> Committed | None:
        """Take `count` rows' logits (None when they decide nothing) after a pass; what it committed, if it ended it."""
        work, cache = self.work, self.cache
        assert work is not None and cache is not None
        work.compute_s += seconds
        work.passes += 1
        if logits_NV is None:
            return None
        length, first = len(self.tokens), cache.length - count
        for row in range(count):
            index = first + row + 1 - length  # of the draft token that this row confirms or not
            if index < work.matched:  # the text itself, or run again after an eviction
                continue
            token = choose(logits_NV[row], self._sampling, length + index)
            self._note(work, logits_NV[row], token)
            if index < len(work.draft) and work.draft[index] == token:
                work.matched += 1
                if token in self._eos_ids:
                    return self._commit(work, ())
                continue
            return self._commit(work, (token,))
        return None

    def next_extension(self, now_s: float) -> None:
        """Go on alone after a round that allows it."""
        work = self.work
        assert work is not None
        self.work = None
        if work.extend and not self.finished:
            self.work = ScheduledWork(len(self.tokens), 0, (), work.extend - 1, True, now_s)

    @property
    def _held(self) -> int:
        return self.cache.length if self.cache is not None else 0

    def _commit(self, work: ScheduledWork, own: tuple[int, ...]) -> Committed:
        assert self.cache is not None
        length = len(self.tokens)
        unsent = self.tokens[work.base + work.skipped :]  # the draft ended inside of the text
        self.tokens += [*work.draft[: work.matched], *own]
        self._ended = self.tokens[-1] in self._eos_ids
        self.cache.truncate(min(self.cache.length, length + work.matched))
        return work.committed((*unsent, *own), work.skipped + work.matched)

    def _note(self, work: ScheduledWork, logits_V: Floats, token: int) -> None:
        if self._logprobs is not None:
            work.logprobs.append(Logprobs(*logprobs(logits_V, token, self._logprobs)))
