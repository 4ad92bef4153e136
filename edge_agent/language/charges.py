"""What one stream of an answer takes of the budgets: reserved before each message, settled when the stream is closed.

A stream that is closed while replies are due has spent all that was reserved: the cloud may still compute, and reply.
"""

from __future__ import annotations

import time

from isthmus.edge_agent.ledger import Ledger, Reservation
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.policy.prices import CostProfile, Energy, Prices
from isthmus.edge_agent.radio import Radio
from isthmus.models.errors import OverBudget
from isthmus.models.messages import Committed
from isthmus.protos.limits import MAX_ERROR_CHARACTERS

TOKEN_BYTES = 64  # of a reply at most for each token, with what is around it
LOGPROB_BYTES = 16  # and for each likely token beside it
PAUSE_S = 2.0  # between two events of a stream in use: a wait for a reply is interrupted every second
SPARE_S = 2.0  # reserved beyond that, so that not every message writes to the disk twice


class Tariff:
    """What messages of prompts take on this device. One for all answers of an agent."""

    def __init__(self, ledger: Ledger, profile: CostProfile) -> None:
        self.ledger, self._radio = ledger, Radio()
        self._prices, self._energy = profile.prices, profile.energy

    def carried(self, up_bytes: int, down_bytes: int, tokens: int) -> Spend:
        """What bytes, and tokens that the cloud decodes, take by themselves."""
        usd = self._prices.usd(up_bytes, 0, 0, down_bytes) + tokens * self._prices.usd_per_token
        return Spend(up_bytes + down_bytes, usd, self._energy.radio_j(up_bytes, down_bytes, 0.0), 0.0)

    def waiting(self, cloud_s: float, wait_s: float) -> Spend:
        """What the cloud's time and the wait for it take."""
        return Spend(0.0, self._prices.usd(0, cloud_s, 0), wait_s * self._energy.idle_w, 0.0)

    def sends(self) -> Spend:
        """A message is sent now. Returns what the radio's tail takes until the next one."""
        return Spend(joules=self._energy.radio_j(0, 0, self._radio.sends()))

    def probe(self, size: int) -> bool:
        """What a probe calls before it moves so many bytes: whether the budgets allow it, and if so they pay."""
        return self.ledger.spend(self.carried(size, 0, 0).plus(self.sends()))


FREE = Tariff(Ledger(), CostProfile("free", Prices(0.0, 0.0), Energy(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)))


class StreamCharges:
    """Those of one stream of an answer."""

    def __init__(self, tariff: Tariff, logprobs: int) -> None:
        """`logprobs`: likely tokens that come beside each of the answer's."""
        self._tariff, self._token_bytes = tariff, TOKEN_BYTES + LOGPROB_BYTES * logprobs
        self._reserved: list[Reservation] = []
        self._extra = Spend()  # tails of the radio, and calls
        self._cloud_s, self._tokens = 0.0, 0
        self._active_s, self._reserved_s, self._seen_s = 0.0, 0.0, time.monotonic()

    def before_sending(self, up_bytes: int, tokens: int) -> None:
        """Reserve what a message may take that lets the cloud decode so many tokens: a call, if any.

        Raises OverBudget, one line, where the budgets do not allow it.
        """
        tariff, extra = self._tariff, self._tariff.sends().plus(Spend(calls=float(tokens > 0)))
        spend = tariff.carried(up_bytes, tokens * self._token_bytes + MAX_ERROR_CHARACTERS, tokens).plus(extra)
        self._reserve(spend.plus(self._more_time()))
        self._extra = self._extra.plus(extra)

    def waits(self) -> None:
        """A reply is still waited for. Raises OverBudget where the budgets do not allow more of that."""
        if any(more := self._more_time()):
            self._reserve(more)

    def replied(self, committed: Committed) -> None:
        """A reply has come."""
        self._tick()
        self._cloud_s += committed.queue_s + committed.compute_s
        self._tokens += len(committed.tokens)

    def close(self, up_bytes: int, down_bytes: int, *, due: bool) -> None:
        """The stream is closed. `due`: replies may still be on the way."""
        if not due and self._reserved:
            spent = self._tariff.carried(up_bytes, down_bytes, self._tokens).plus(self._extra)
            self._tick()
            spent = spent.plus(self._tariff.waiting(min(self._cloud_s, self._active_s), self._active_s))
            for reservation in self._reserved:  # the first pays for all: what is left open meanwhile counts as spent
                reservation.settle(spent)
                spent = Spend()
        else:
            for reservation in self._reserved:
                reservation.settle(reservation.spend)
        self._reserved.clear()

    def _tick(self) -> None:
        """Count the time since the last event; a longer pause is that of whoever reads the answer."""
        now_s = time.monotonic()
        self._active_s += min(now_s - self._seen_s, PAUSE_S)
        self._seen_s = now_s

    def _more_time(self) -> Spend:
        """What is to be reserved for the time until the next event: nothing while enough is."""
        self._tick()
        if self._active_s + PAUSE_S <= self._reserved_s:
            return Spend()
        more_s = self._active_s + PAUSE_S + SPARE_S - self._reserved_s
        self._reserved_s += more_s
        return self._tariff.waiting(more_s, more_s)

    def _reserve(self, spend: Spend) -> None:
        reservation = self._tariff.ledger.reserve(spend)
        if reservation is None:
            raise OverBudget(self._tariff.ledger.refusal(spend))
        self._reserved.append(reservation)
