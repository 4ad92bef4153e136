"""One session's committed tokens, and how a round is settled on an engine's choices. No engine, queue or network.

tokens (committed)  t0 t1 ... t(L-1)
draft               from position `base`: the part that equals committed tokens is skipped; any other makes it stale
choices             the engine's tokens of positions L, L + 1, ...: the draft is confirmed while it equals them, and the
                    first that differs, or that follows the draft, is committed too
scored draft        confirmed as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from isthmus.models.errors import InvalidInput
from isthmus.models.messages import Committed, Logprobs, Round


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
    forced: int = 0  # of the committed tokens, those that took no step, after the chosen one
    logprobs: list[Logprobs] = field(default_factory=list)
    states: tuple[bytes, ...] = ()  # of the draft, in a handoff
    decoded_from: frozenset[int] = frozenset()  # indices of states that a token was decoded from before
    score: bool = False  # the draft is the text, whatever the choices

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


class CommittedTokens:
    """The tokens of a session of which the cloud decides each."""

    def __init__(
        self, tokens: Sequence[int], eos_ids: Iterable[int], context: int, logprobs: int | None = None
    ) -> None:
        """`logprobs`: as in the session's opening."""
        self.tokens = list(tokens)
        self.scheduled: ScheduledWork | None = None
        self._eos_ids = frozenset(eos_ids)
        self._context = context
        self._logprobs = logprobs
        self._ended = False

    def check(self, round_: Round) -> None:
        """Raises InvalidInput for a round that this session can never accept."""
        if round_.states:
            raise InvalidInput("a round of states in a session that was opened without a handoff")
        if round_.score and self._logprobs is None:
            raise InvalidInput("a scored round in a session without log-probabilities")

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
        draft = round_.draft[len(known) :][: self._context - length - (not round_.score)]
        if round_.score and not draft:
            return Committed(round_.base, len(known))
        if self.finished:
            return Committed(round_.base, len(known), tuple(self.tokens[round_.base + len(known) :]))
        self.scheduled = ScheduledWork(
            round_.base, len(known), draft, round_.extend, False, arrived_s, score=round_.score
        )
        return None

    def settle(self, token: int) -> Committed | None:
        """`token` is chosen for the first position that nothing was chosen for. The reply, if that ends the round."""
        work = self.scheduled
        assert work is not None
        if work.score:
            work.matched += 1
            return self._commit(work, ()) if work.matched == len(work.draft) else None
        if work.matched < len(work.draft) and work.draft[work.matched] == token:
            work.matched += 1
            return self._commit(work, ()) if token in self._eos_ids else None
        return self._commit(work, (token,))

    def next_extension(self, now_s: float) -> None:
        """End the scheduled round; schedule the next token of its extension, if it allows one."""
        work = self.scheduled
        assert work is not None
        self.scheduled = None
        if work.extend and not self.finished:
            self.scheduled = ScheduledWork(len(self.tokens), 0, (), work.extend - 1, True, now_s)

    @property
    def room(self) -> int:
        """Tokens that the context still has room for."""
        return self._context - len(self.tokens)

    @property
    def finished(self) -> bool:
        """Nothing can follow: an end-of-text token was committed, or the context is full."""
        return self._ended or len(self.tokens) >= self._context

    def _commit(self, work: ScheduledWork, own: tuple[int, ...]) -> Committed:
        unsent = self.tokens[work.base + work.skipped :]  # the draft ended within the committed tokens
        self.tokens += [*work.draft[: work.matched], *own]
        self._ended = self.tokens[-1] in self._eos_ids and not work.score
        return work.committed((*unsent, *own), work.skipped + work.matched)
