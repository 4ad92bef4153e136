"""What one photo takes of the budgets: reserved before each message, settled when its reply has come.

A message without a reply has spent all that was reserved for it: the cloud may still compute, and answer late.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.edge_agent.ledger import Ledger, Reservation
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.radio import Radio
from isthmus.edge_agent.vision.costs import Costs, Reply
from isthmus.models.errors import OverBudget


class Charges:
    """Those of one photo. Close it when nothing more is sent."""

    def __init__(self, ledger: Ledger, costs: Costs, radio: Radio, left_s: Callable[[], float]) -> None:
        """`left_s`: seconds that the cloud has."""
        self._ledger, self._costs, self._radio, self._left_s = ledger, costs, radio, left_s
        self._open: tuple[Reservation, int, float] | None = None  # of the last message
        self.spent = Spend()

    def before_sending(self, up_bytes: int) -> None:
        """Reserve what a message may take. Raises OverBudget, one line, where the budgets do not allow it."""
        self.close()
        spend = self._costs.reserve(up_bytes, self._left_s(), self._radio.since_s())
        reservation = self._ledger.reserve(spend)
        if reservation is None:
            raise OverBudget(self._ledger.refusal(spend))
        self._open = reservation, up_bytes, self._radio.sends()

    def answered(self, reply: Reply) -> None:
        """The last message was answered."""
        if self._open is not None:
            _, up_bytes, since_s = self._open
            self._settle(self._costs.spent(up_bytes, reply, since_s))

    def close(self) -> None:
        """No reply is waited for any more."""
        if self._open is not None:
            self._settle(self._open[0].spend)

    def _settle(self, spent: Spend) -> None:
        assert self._open is not None  # callers have looked
        reservation, self._open = self._open[0], None
        self.spent = self.spent.plus(spent)
        reservation.settle(spent)
