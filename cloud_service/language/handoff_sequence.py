"""One handoff session in the cloud: the device defines the tokens and sends their hidden states.

tokens, cache   t0 t1 ... t(L-1): what was sent and computed; a round replaces all from its `base` on
states          of t(base) ...; the last one, if the round asks for a token, decides it; the device sends it next time

States are not kept. Without its cache a round is lost, and the device opens the session again. No queue, no thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.cloud_service.language.rounds import ScheduledWork
from isthmus.models.errors import InvalidInput, PayloadTooLarge
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.sampling import Floats, logprobs
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_LAST
from isthmus.models.messages import Committed, Logprobs, Opening, Round

MAX_FILLED_STATES = 32  # of one session in a step: decoding them takes some 10 ms, for which the other sessions wait


class HandoffSequence:
    """Tokens whose keys and values the upper layers' cache holds, and the round that extends them."""

    def __init__(
        self,
        tokens: Sequence[int],
        opening: Opening,
        max_state_bytes: int,
        context: int,
        chooser: TokenChooser | None = None,
    ) -> None:
        """`max_state_bytes`: the bundle's own cap. `chooser`: None for that of a sampling without a grammar."""
        self.tokens = list(tokens)
        self._chooser = chooser or TokenChooser(opening.sampling, opening.answer_start)
        self.fill = opening.prefill_layers > 0
        self._opening = opening
        self.cache: KVCache | None = None
        self.scheduled: ScheduledWork | None = None
        self._max_state_bytes = max_state_bytes
        self._context = context

    def check(self, round_: Round) -> None:
        """Raises InvalidInput or PayloadTooLarge for a round that this session can never accept."""
        if not round_.states:
            raise InvalidInput("a round without states in a handoff session")
        if (size := max(map(len, round_.states))) > self._max_state_bytes:
            raise PayloadTooLarge(f"a state has {size} bytes, the handoff's cap is {self._max_state_bytes}")
        tokens = round_.base + len(round_.states) + round_.extend
        if tokens > self._context:
            raise InvalidInput(f"{tokens} tokens, the model's context is {self._context}")

    def begin(self, round_: Round, arrived_s: float) -> None:
        """Schedule a round: the tokens end at its `base`. A round that is `lost` changes nothing."""
        states, decoded_from = round_.states, frozenset(round_.decoded_from)
        self.scheduled = ScheduledWork(
            round_.base, 0, round_.draft, round_.extend, False, arrived_s, states=states, decoded_from=decoded_from
        )
        if not self.lost:
            self.rewind()

    @property
    def state_bytes(self) -> int:
        """What choosing takes beside the tokens."""
        return self._chooser.state_bytes

    @property
    def lost(self) -> bool:
        """Whether the round builds on tokens whose keys and values are not held (any more)."""
        return self.scheduled is not None and self.scheduled.base > self._cached

    @property
    def restartable(self) -> bool:
        """Whether the scheduled round survives an eviction: it brings all states from the first token on."""
        return self.scheduled is None or self.scheduled.base == 0

    def rewind(self) -> None:
        """Back to where the round began, as if none of its states had been computed."""
        assert self.scheduled is not None
        del self.tokens[self.scheduled.base :]
        if self.cache is not None:
            self.cache.truncate(self.scheduled.base)

    def drop_cache(self) -> None:
        """The cache was evicted, or cannot be trusted; the tokens mean nothing without it."""
        self.cache = None
        self.tokens.clear()

    @property
    def reusable_length(self) -> int:
        """Tokens whose keys and values a compatible session can hand on."""
        return len(self.tokens)

    @property
    def final_length(self) -> int:
        """Tokens when the scheduled round has ended."""
        return self.scheduled.base + len(self.scheduled.draft) if self.scheduled else len(self.tokens)

    @property
    def pending_tokens(self) -> int:
        """Hidden states that the next step could run through the layers; one for a step that only fills."""
        left = self.final_length - self._cached if self.scheduled else 0
        fills = self._fills(left)
        return min(left, 1) if fills > MAX_FILLED_STATES else max(left - fills, min(left, 1))

    def next_states(self, count: int) -> tuple[tuple[bytes, ...], int]:
        """The states of the next step, and how many of them, the last ones, run through the layers: at most `count`."""
        work = self.scheduled
        assert work is not None
        left = work.states[self._cached - work.base :]
        fills = self._fills(len(left))
        if fills > MAX_FILLED_STATES:
            return left[:MAX_FILLED_STATES], 0
        through = min(count, len(left) - fills)
        return left[: fills + through], through

    def rate_at(self, position: int) -> int:
        """The rate that the state of a position in the round is coded at."""
        work = self.scheduled
        assert work is not None
        decides = position - work.base in work.decoded_from or (work.extend and position == self.final_length - 1)
        return self._opening.rate if decides else self._opening.context_rate

    def _fills(self, left: int) -> int:
        """How many of the `left` remaining states decide nothing and are not close before the one that does."""
        work = self.scheduled
        if not self.fill or work is None:
            return 0
        exact = work.extend if work.base else work.extend * EXACT_LAST
        return max(left - exact, 0)

    def id_at(self, position: int) -> int:
        """The token at a position, in the round or before it."""
        work = self.scheduled
        assert work is not None
        return work.draft[position - work.base] if position >= work.base else self.tokens[position]

    @property
    def needs_logits(self) -> bool:
        """Whether the last state that was computed decides a token."""
        return self.scheduled is not None and bool(self.scheduled.extend) and self._cached == self.final_length

    def complete_step(self, logits_V: Floats | None, seconds: float) -> Committed | None:
        """Account for a step. `logits_V`: of its last state, when that decides a token.

        Returns the reply, if this step ended the round. Raises InvalidInput where the grammar cannot go on.
        """
        work = self.scheduled
        assert work is not None
        work.compute_s += seconds
        work.steps += 1
        self.tokens[work.base :] = work.draft[: self._cached - work.base]
        if self._cached < self.final_length:
            return None
        own: tuple[int, ...] = ()
        if logits_V is not None:
            own = (self._chooser.choose(logits_V, self.tokens),)
            if self._opening.logprobs is not None:
                work.logprobs.append(Logprobs(*logprobs(logits_V, own[0], self._opening.logprobs)))
        return work.committed(own)

    def next_extension(self, now_s: float) -> None:
        """End the scheduled round; a handoff has no extension."""
        self.scheduled = None

    @property
    def _cached(self) -> int:
        return self.cache.length if self.cache is not None else 0
