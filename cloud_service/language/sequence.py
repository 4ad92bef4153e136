"""One session's tokens and their KV cache in the native engine. No queue, no thread, no network.

fed to the model    tokens[cache.length:] + draft; the logits of position p decide the token of position p + 1
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.cloud_service.language.rounds import CommittedTokens, ScheduledWork
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.sampling import Floats, logprobs
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, exact_last
from isthmus.models.messages import Committed, Logprobs, Opening


class TokenSequence(CommittedTokens):
    """A session's committed tokens and their KV cache (None: evicted; it is computed again from the tokens)."""

    restartable = True  # an eviction costs time, and loses no round

    def __init__(
        self,
        tokens: Sequence[int],
        opening: Opening,
        eos_ids: frozenset[int],
        context: int,
        chooser: TokenChooser | None = None,
    ) -> None:
        """`chooser`: None for that of a sampling without a grammar."""
        super().__init__(tokens, eos_ids, context, opening.logprobs)
        self.prefill_layers = opening.prefill_layers
        stop = len(tokens) - exact_last(len(tokens)) if opening.prefill_layers else 0
        self._approximated = range(EXACT_FIRST, max(stop, EXACT_FIRST))  # positions that may skip the upper layers
        self.cache: KVCache | None = None
        self._chooser = chooser or TokenChooser(opening.sampling, opening.answer_start)

    @property
    def state_bytes(self) -> int:
        """What choosing takes beside the tokens."""
        return self._chooser.state_bytes

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
        return len(self.tokens) + (len(self.scheduled.draft) - self.scheduled.score if self.scheduled else 0)

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

        Returns what the round committed, if this step ended it. Raises InvalidInput where the grammar cannot go on.
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
            token = work.draft[index] if work.score else self._chooser.choose(logits_NV[row], self._text(index))
            self._note(work, logits_NV[row], token)
            if (committed := self.settle(token)) is not None:
                return committed
        return None

    @property
    def _cached(self) -> int:
        return self.cache.length if self.cache is not None else 0

    def rewind(self) -> None:
        """A step failed this session: forget what it computed beyond the committed tokens."""
        if self.cache is not None:
            self.cache.truncate(min(self.cache.length, len(self.tokens)))

    def _commit(self, work: ScheduledWork, own: tuple[int, ...]) -> Committed:
        assert self.cache is not None
        self.cache.truncate(min(self.cache.length, len(self.tokens) + work.matched))
        return super()._commit(work, (*own, *self._forced_after(work, own)))

    def _forced_after(self, work: ScheduledWork, own: tuple[int, ...]) -> list[int]:
        """Tokens of the extension that the grammar forces: they take no step. None with log-probabilities: those do."""
        if self._chooser.sampling.grammar is None or self._logprobs is not None:
            return []
        text = [*self._text(work.matched), *own]
        forced: list[int] = []
        while work.extend and text[-1] not in self._eos_ids and len(text) < self._context:
            if (token := self._chooser.forced(text)) is None:
                break
            forced.append(token)
            text.append(token)
            work.extend -= 1
        work.forced = len(forced)
        return forced

    def _text(self, drafted: int) -> list[int]:
        """The committed tokens with the first of the scheduled draft."""
        assert self.scheduled is not None
        return [*self.tokens, *self.scheduled.draft[:drafted]] if drafted else self.tokens

    def _note(self, work: ScheduledWork, logits_V: Floats, token: int) -> None:
        if self._logprobs is not None:
            work.logprobs.append(Logprobs(*logprobs(logits_V, token, self._logprobs)))
