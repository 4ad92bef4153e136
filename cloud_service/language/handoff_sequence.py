"""One hand-off session's text in the cloud: the device says what it is, and brings its hidden states.

tokens, cache   t0 t1 ... t(L-1): what was sent and taken up; a round replaces all from its `base` on
states          of t(base) ...; the row of the last, if asked, decides the token behind it, which the device then sends

States are not kept. Where the cache is gone the round is lost, and the device opens again. No queue, no thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.cloud_service.language.sequence import ScheduledWork
from isthmus.models.errors import InvalidInput, PayloadTooLarge
from isthmus.models.language.sampling import Floats, choose, logprobs
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_LAST
from isthmus.models.messages import Committed, Logprobs, Opening, Round, Sampling

FILL_ROWS = 32  # of one session beside a pass: decoding their states takes some 10 ms, which others wait


class HandoffSequence:
    """Tokens whose keys and values are in the cache of the layers behind the cut, and nothing else."""

    def __init__(self, tokens: Sequence[int], opening: Opening, max_state_bytes: int, context: int) -> None:
        """`max_state_bytes`: the bundle's own cap."""
        self.tokens = list(tokens)
        self.sampling: Sampling = opening.sampling
        self.fill = opening.prefill_layers > 0
        self._opening = opening
        self.cache: KVCache | None = None
        self.work: ScheduledWork | None = None
        self._max_state_bytes = max_state_bytes
        self._context = context

    def check(self, round_: Round) -> None:
        """Raises InvalidInput or PayloadTooLarge for a round that this session can never take."""
        if not round_.states:
            raise InvalidInput("a round without states in a session of a hand-off")
        if (size := max(map(len, round_.states))) > self._max_state_bytes:
            raise PayloadTooLarge(f"a state has {size} bytes, the hand-off's cap is {self._max_state_bytes}")
        tokens = round_.base + len(round_.states) + round_.extend
        if tokens > self._context:
            raise InvalidInput(f"{tokens} tokens, the model's context is {self._context}")

    def begin(self, round_: Round, arrived_s: float) -> None:
        """Take up a round: the text ends at its `base`. One that is `lost` changes nothing."""
        states, decided = round_.states, frozenset(round_.decoded_from)
        self.work = ScheduledWork(
            round_.base, 0, round_.draft, round_.extend, False, arrived_s, states=states, decided=decided
        )
        if not self.lost:
            self.cut()

    @property
    def lost(self) -> bool:
        """Whether the round builds on tokens that are not held (any more)."""
        return self.work is not None and self.work.base > self._held

    def cut(self) -> None:
        """Back to where the round began, as if none of its states had been taken."""
        assert self.work is not None
        del self.tokens[self.work.base :]
        if self.cache is not None:
            self.cache.truncate(self.work.base)

    def forget(self) -> None:
        """The state is gone, and with it the text."""
        self.cache = None
        self.tokens.clear()

    @property
    def reusable(self) -> int:
        """Tokens whose state a session that takes over from another can use."""
        return len(self.tokens)

    @property
    def extent(self) -> int:
        """Tokens when the round at hand has ended."""
        return self.work.base + len(self.work.draft) if self.work else len(self.tokens)

    @property
    def rows(self) -> int:
        """Rows of a pass that the round could still use; one when a turn of filling is due."""
        left = self.extent - self._held if self.work else 0
        fills = self._fills(left)
        return min(left, 1) if fills > FILL_ROWS else max(left - fills, min(left, 1))

    def next_states(self, rows: int) -> tuple[tuple[bytes, ...], int]:
        """The next states, given `rows` rows of a pass, and how many of them, the last, go through the layers."""
        work = self.work
        assert work is not None
        left = work.states[self._held - work.base :]
        fills = self._fills(len(left))
        if fills > FILL_ROWS:
            return left[:FILL_ROWS], 0
        through = min(rows, len(left) - fills)
        return left[: fills + through], through

    def rate_at(self, position: int) -> int:
        """Of the state of a position in the round."""
        work = self.work
        assert work is not None
        decides = position - work.base in work.decided or (work.extend and position == self.extent - 1)
        return self._opening.rate if decides else self._opening.context_rate

    def _fills(self, left: int) -> int:
        """How many of the round's states that are left decide nothing and are not near what is decided first."""
        work = self.work
        if not self.fill or work is None:
            return 0
        exact = work.extend if work.base else work.extend * EXACT_LAST
        return max(left - exact, 0)

    def id_at(self, position: int) -> int:
        """The token of a position, of the round or before it."""
        work = self.work
        assert work is not None
        return work.draft[position - work.base] if position >= work.base else self.tokens[position]

    @property
    def decides(self) -> bool:
        """Whether the last row that was fed decides a token."""
        return self.work is not None and bool(self.work.extend) and self._held == self.extent

    def settle(self, logits_V: Floats | None, seconds: float) -> Committed | None:
        """After a pass, with logits behind the last row when that decides; the answer, if the round has ended."""
        work = self.work
        assert work is not None
        work.compute_s += seconds
        work.passes += 1
        self.tokens[work.base :] = work.draft[: self._held - work.base]
        if self._held < self.extent:
            return None
        own: tuple[int, ...] = ()
        if logits_V is not None:
            own = (choose(logits_V, self.sampling, self.extent),)
            if self._opening.logprobs is not None:
                work.logprobs.append(Logprobs(*logprobs(logits_V, own[0], self._opening.logprobs)))
        return work.committed(own)

    def next_extension(self, now_s: float) -> None:
        """The round has ended; nothing follows by itself."""
        self.work = None

    @property
    def _held(self) -> int:
        return self.cache.length if self.cache is not None else 0
