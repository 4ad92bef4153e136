"""The fake of a link to a cloud for photos: what an agent reads of it. A subclass says what requests are answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.models.messages import Payload


class Asked(NamedTuple):
    """The arguments of `Link.infer`."""

    payload: Payload
    budget_s: float
    tasks: tuple[int, ...]
    sent: Callable[[int], None]
    charge: Callable[[int], None]


class AnyLink:
    """A link that may be used, of which nothing is known."""

    target: str = "cloud:1"
    state: str = "closed"
    ready: bool = True
    refusal: str | None = None
    estimate: LinkEstimate = LinkEstimate(0.01, 1e6)
    changes = 0

    def planned(self) -> None:
        pass

    def close(self) -> None:
        pass

    def unavailable_reason(self) -> str | None:
        return self.refusal

    def infer(
        self,
        payload: Payload,
        budget_s: float,
        tasks: tuple[int, ...],
        sent: Callable[[int], None],
        charge: Callable[[int], None],
    ) -> Exchange:
        return self.answer(Asked(payload, budget_s, tasks, sent, charge))

    def answer(self, asked: Asked) -> Exchange:
        """What the cloud answers. Raises what a link raises."""
        raise NotImplementedError
