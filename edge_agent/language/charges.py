"""What one stream of an answer takes of the budgets: reserved before each message, settled when the stream is closed.

A stream that is closed while replies are due has spent all that was reserved: the cloud may still compute, and reply.
"""

from __future__ import annotations

import time

from isthmus.edge_agent.ledger import Ledger, Reservation
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.policy.prices import CostProfile, Energy, Prices
from isthmus.edge_agent.radio import Radio
from isthmus.edge_agent.transport.generate_stream import Traffic
from isthmus.models.errors import OverBudget
from isthmus.models.messages import Committed
from isthmus.protos.limits import MAX_ERROR_CHARACTERS

REPLY_BYTES = 96  # of a reply without its tokens, at most
TOKEN_BYTES, LOGPROB_BYTES = 8, 16  # of a token, and of each likely token beside it
PAUSE_S = 2.0  # between two events of a stream in use: a wait for a reply is interrupted every second
SPARE_S = 2.0  # reserved beyond that, so that not every message writes to the disk twice


class Tariff:
    """What messages of prompts take on this device. One for all answers of an agent."""

    def __init__(self, ledger: Ledger, profile: CostProfile) -> None:
        self.ledger, self.radio = ledger, Radio()
        self._prices, self._energy = profile.prices, profile.energy

    def carried(self, up_bytes: int, down_bytes: int, tokens: int) -> Spend:
        """What bytes, and tokens that the cloud decodes, take by themselves."""
        usd = self._prices.usd(up_bytes, 0, 0, down_bytes) + tokens * self._prices.usd_per_token
        return Spend(up_bytes + down_bytes, usd, self._energy.radio_j(up_bytes, down_bytes, 0.0), 0.0)

    def waiting(self, cloud_s: float, wait_s: float) -> Spend:
        """What the cloud's time and the wait for it take."""
        return Spend(0.0, self._prices.usd(0, cloud_s, 0), wait_s * self._energy.idle_w, 0.0)

    def tail(self) -> Spend:
        """What the radio's tail since the last message takes, if one is sent now."""
        return Spend(joules=self._energy.radio_j(0, 0, self.radio.since_s()))


FREE = Tariff(Ledger(), CostProfile("free", Prices(0.0, 0.0), Energy(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)))


class StreamCharges:
    """Those of one stream of an answer."""

    def __init__(self, tariff: Tariff, logprobs: int) -> None:
        """`logprobs`: likely tokens that come beside each of the answer's."""
        self._tariff, self._token_bytes = tariff, TOKEN_BYTES + LOGPROB_BYTES * logprobs
        self._reservations: list[Reservation] = []
        self._reserved = Spend()  # all of them together
        self._messages = Spend()  # what was sent and what may come, without the time it takes
        self._tails, self._calls = Spend(), Spend()
        self._cloud_s, self._tokens = 0.0, 0
        self._active_s, self._seen_s = 0.0, time.monotonic()

    def before_sending(self, traffic: Traffic) -> None:
        """Reserve what the stream may take with a message that is to be sent; a round is a call of the cloud.

        Raises OverBudget, one line, where the budgets do not allow it.
        """
        tails, calls = self._tails.plus(self._tariff.tail()), Spend(calls=float(traffic.rounds))
        coming = traffic.replies_due * REPLY_BYTES + traffic.tokens_due * self._token_bytes + MAX_ERROR_CHARACTERS
        tokens = self._tokens + traffic.tokens_due
        carried = self._tariff.carried(traffic.up_bytes, traffic.down_bytes + coming, tokens)
        self._reserve(carried.plus(tails).plus(calls))
        self._tails, self._calls = tails, calls
        self._tariff.radio.sends()

    def waits(self) -> None:
        """A reply is waited for. Raises OverBudget where the budgets do not allow more of that."""
        self._reserve(self._messages)

    def _reserve(self, messages: Spend) -> None:
        """Reserve what is lacking for messages and the time until the next event."""
        self._tick()
        until_s = self._active_s + PAUSE_S
        if any(messages.plus(self._tariff.waiting(until_s, until_s)).beyond(self._reserved)):
            until_s += SPARE_S
            more = messages.plus(self._tariff.waiting(until_s, until_s)).beyond(self._reserved)
            reservation = self._tariff.ledger.reserve(more)
            if reservation is None:
                raise OverBudget(self._tariff.ledger.refusal(more))
            self._reservations.append(reservation)
            self._reserved = self._reserved.plus(more)
        self._messages = messages

    def replied(self, committed: Committed) -> None:
        """A reply has come."""
        self._tick()
        self._cloud_s += committed.queue_s + committed.compute_s
        self._tokens += len(committed.tokens)

    def close(self, up_bytes: int, down_bytes: int, *, due: bool) -> None:
        """The stream is closed. `due`: replies may still be on the way."""
        self._tick()
        spent = self._reserved
        if not due:
            carried = self._tariff.carried(up_bytes, down_bytes, self._tokens)
            waited = self._tariff.waiting(min(self._cloud_s, self._active_s), self._active_s)
            spent = carried.plus(self._tails).plus(self._calls).plus(waited)
        for reservation in self._reservations:  # the first pays for all: what is left open meanwhile counts as spent
            reservation.settle(spent)
            spent = Spend()
        self._reservations.clear()

    def _tick(self) -> None:
        """Count the time since the last event; a longer pause is that of whoever reads the answer."""
        now_s = time.monotonic()
        self._active_s += min(now_s - self._seen_s, PAUSE_S)
        self._seen_s = now_s
