"""One session's tokens in the cloud, and how a round extends them. No queue, no thread, no network.

tokens (committed)  t0 t1 ... t(L-1)
draft               from position `base`: the part that equals committed tokens is skipped; any other makes it stale
fed to the model    tokens[cache.length:] + draft; the logits of position p decide the token of position p + 1
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
    """A round that is being computed; `matched` tokens of its draft are confirmed so far."""

    base: int
    skipped: int  # tokens from `base` on that were sent, and committed already when the round began
    draft: tuple[int, ...]  # the others
    extend: int
    extension: bool
    arrived_s: float
    started_s: float | None = None
    matched: int = 0
    compute_s: float = 0.0
    steps: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    states: tuple[bytes, ...] = ()  # of the draft, in a handoff
    decoded_from: frozenset[int] = frozenset()  # indices of states that a token was decoded from before

    def committed(self, tokens: tuple[int, ...], accepted: int = 0) -> Committed:
        """The reply to the round, with its queue time, compute time and number of steps."""
        return Committed(
            base=self.base,
            accepted=accepted,
            tokens=tokens,
            extension=self.extension,
            queue_s=(self.started_s or self.arrived_s) - self.arrived_s,
            compute_s=self.compute_s,
            passes=self.steps,
            logprobs=tuple(self.logprobs),
        )


class TokenSequence:
    """A session's committed tokens and their KV cache (None: evicted; it is computed again from the tokens)."""

    restartable = True  # an eviction costs time, and loses no round

    def __init__(self, tokens: Sequence[int], opening: Opening, eos_ids: frozenset[int], context: int) -> None:
        self.tokens = list(tokens)
        self.prefill_layers = opening.prefill_layers
        stop = len(tokens) - exact_last(len(tokens)) if opening.prefill_layers else 0
        self._approximated = range(EXACT_FIRST, max(stop, EXACT_FIRST))  # positions that may skip the upper layers
        self.cache: KVCache | None = None
        self.scheduled: ScheduledWork | None = None
        self._sampling, self._logprobs = opening.sampling, opening.logprobs
        self._eos_ids = eos_ids
        self._context = context
        self._ended = False

    def check(self, round_: Round) -> None:
        """Raises InvalidInput for a round that this session can never accept."""
        if round_.states:
            raise InvalidInput("a round of states in a session that was opened without a handoff")

    def begin(self, round_: Round, arrived_s: float) -> Committed | None:
        """Schedule a round. A stale one, or one with nothing left to decide, is answered at once.

        After a stale round too the cloud may generate an extension.
        """
        length = len(self.tokens)
        known = self.tokens[round_.base : round_.base + len(round_.draft)]
        if round_.base > length or list(round_.draft[: len(known)]) != known:
            if round_.extend and not self.finished:
                self.scheduled = ScheduledWork(length, 0, (), round_.extend - 1, True, arrived_s)
            return Committed(length)
        if self.finished:
            return Committed(round_.base, len(known), tuple(self.tokens[round_.base + len(known) :]))
        draft = round_.draft[len(known) :][: self._context - length - 1]
        self.scheduled = ScheduledWork(round_.base, len(known), draft, round_.extend, False, arrived_s)
        return None

    @property
    def finished(self) -> bool:
        """Nothing can follow: an end-of-text token was committed, or the context is full."""
        return self._ended or len(self.tokens) >= self._context

    @property
    def lost(self) -> bool:
        """Never: an evicted cache is computed again from the tokens."""
        return False

    def drop_cache(self) -> None:
        """The cache was evicted, or cannot be trusted."""
        self.cache = None

    @property
    def reusable_length(self) -> int:
        """Tokens whose keys and values a compatible session can hand on: the last one is fed again for its logits."""
        return len(self.tokens) - 1

    @property
    def final_length(self) -> int:
        """Tokens that the cache may hold when the scheduled round has ended."""
        return len(self.tokens) + (len(self.scheduled.draft) if self.scheduled else 0)

    @property
    def pending_tokens(self) -> int:
        """Tokens that the next step could compute for the scheduled round, all of them by the same runner."""
        if self.scheduled is None:
            return 0
        ends = (self._approximated.start, self._approximated.stop) if self._approximated else ()
        return next((end for end in ends if self._cached < end), self.final_length) - self._cached

    @property
    def skips_upper_layers(self) -> bool:
        """Whether the next tokens decide nothing and may skip the layers after `prefill_layers`."""
        return self._cached in self._approximated

    def next_ids(self, count: int) -> list[int]:
        """The next `count` tokens to feed."""
        assert self.scheduled is not None and self.cache is not None
        start = self.cache.length
        return [*self.tokens, *self.scheduled.draft][start : start + count]

    def needs_logits(self, count: int) -> bool:
        """Whether one of the next `count` tokens decides a token."""
        assert self.cache is not None
        return self.cache.length + count >= len(self.tokens)

    def complete_step(self, logits_NV: Floats | None, count: int, seconds: float) -> Committed | None:
        """Account for a step of `count` tokens. `logits_NV`: theirs, None when they decide nothing.

        Returns what the round committed, if this step ended it.
        """
        work, cache = self.scheduled, self.cache
        assert work is not None and cache is not None
        work.compute_s += seconds
        work.steps += 1
        if logits_NV is None:
            return None
        length, first = len(self.tokens), cache.length - count
        for row in range(count):
            index = first + row + 1 - length  # of the draft token that these logits confirm or reject
            if index < work.matched:  # committed already, or computed again after an eviction
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
        """End the scheduled round; schedule the next token of its extension, if it allows one."""
        work = self.scheduled
        assert work is not None
        self.scheduled = None
        if work.extend and not self.finished:
            self.scheduled = ScheduledWork(len(self.tokens), 0, (), work.extend - 1, True, now_s)

    @property
    def _cached(self) -> int:
        return self.cache.length if self.cache is not None else 0

    def _commit(self, work: ScheduledWork, own: tuple[int, ...]) -> Committed:
        assert self.cache is not None
        length = len(self.tokens)
        unsent = self.tokens[work.base + work.skipped :]  # the draft ended within the committed tokens
        self.tokens += [*work.draft[: work.matched], *own]
        self._ended = self.tokens[-1] in self._eos_ids
        self.cache.truncate(min(self.cache.length, length + work.matched))
        return work.committed((*unsent, *own), work.skipped + work.matched)

    def _note(self, work: ScheduledWork, logits_V: Floats, token: int) -> None:
        if self._logprobs is not None:
            work.logprobs.append(Logprobs(*logprobs(logits_V, token, self._logprobs)))
