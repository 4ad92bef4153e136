"""The clouds that hold one vision bundle, in order of preference: where a photo is sent, and where after that.

    best    the first that would take a photo at once, else the first that may be used
    infer   there; when that cloud is lost, late or refuses the photo: at the next one, while there is time

A photo may be sent again since its answer does not depend on earlier ones. It is answered once: what comes from a cloud
after its photo was sent to another is dropped. No session ties photos to a cloud, so a preferred one is used again as
soon as it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from time import monotonic

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exploration import ProbeSchedule, Spend, always
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.transport.health import FAIR_WAIT_S, NOT_ANSWERING
from isthmus.edge_agent.transport.link import Link
from isthmus.edge_agent.vision.request import RequestState
from isthmus.models.errors import LinkDown, LinkError, ServiceError
from isthmus.models.messages import Payload
from isthmus.models.vision.manifest import Manifest
from isthmus.models.vision.outputs import bounds_of

MARGIN = 2.0  # times its predicted time: what a cloud has at least, and FAIR_WAIT_S, where two share a photo's time


class Replicas:
    """Links in order of preference, each with its own circuit breaker and estimate. Safe to call from several threads.

    False without any.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = tuple(links)

    def __bool__(self) -> bool:
        return bool(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    @property
    def current(self) -> Link | None:
        """The one that is used now; the first while none can be."""
        return self.best() or next(iter(self._links), None)

    def wait_probed(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` until the first one, or else another, has answered."""
        until_s = monotonic() + timeout_s
        for link in self._links:
            if link.wait_probed(max(until_s - monotonic(), 0.0)):
                return

    def best(self, besides: Collection[Link] = ()) -> Link | None:
        """The first that would take a request at once, or else the first whose breaker is not open; none of `besides`.

        One with much to do, or with a trial request under way, is passed over while another has room.
        """
        usable = [link for link in self._links if link.state != "open" and link not in besides]
        return next((link for link in usable if link.ready), usable[0] if usable else None)

    def unavailable_reason(self) -> str:
        """Why nothing can be sent, while `best` is None; of several clouds by address."""
        reasons = [(link.target, link.unavailable_reason() or NOT_ANSWERING) for link in self._links]
        if len(reasons) < 2:
            return reasons[0][1] if reasons else "no cloud is configured"
        return "; ".join(f"{target}: {reason}" for target, reason in reasons)

    def infer(
        self,
        payload: Payload,
        tasks: tuple[int, ...],
        state: RequestState,
        left_s: Callable[[], float],
        cloud_s: float,
    ) -> Exchange:
        """Send a payload, and wait for answers to `tasks` within `left_s()`; `cloud_s` is what a cloud may need for it.

        Counts what was sent in `state`, and says there which clouds were tried in vain. Raises what `Link.infer` raises
        at the last one that was tried, CancelledError.
        """
        size, tried = len(payload.data), list[Link]()
        link = self.best()
        if link is None:
            raise LinkDown(self.unavailable_reason())
        while True:
            tried.append(link)
            budget_s = self._budget_s(link, self.best(tried), left_s(), size, cloud_s)
            try:
                return link.infer(payload, budget_s, tasks, state.add_up_bytes, state.charge)
            except (LinkError, ServiceError) as error:
                following = self.best(tried)
                if following is None or left_s() < following.estimate.transfer_s(size):
                    raise
                state.raise_if_cancelled()
                state.detours.append(f"{link.target}: {error}, sent to {following.target}")
                link = following

    @staticmethod
    def _budget_s(link: Link, following: Link | None, left_s: float, size: int, cloud_s: float) -> float:
        """Seconds for one cloud: a silent one leaves time for the following, where there is enough for both."""
        if following is None:
            return left_s
        least_s, reserve_s = (
            max(MARGIN * (each.estimate.reply_s(size) + cloud_s), FAIR_WAIT_S) for each in (link, following)
        )
        return left_s - reserve_s if left_s >= least_s + reserve_s else left_s

    def close(self) -> None:
        """Close every link."""
        for link in self._links:
            link.close()


def connect(
    config: EdgeConfig, manifest: Manifest, fingerprint: bytes, late: Callable[[], None], spend: Spend = always
) -> Replicas:
    """Links to the clouds of `config`, none in mode edge; waits for one up to `connect_s`.

    `fingerprint` is the bundle's. `late` is called for each reply that nobody waits for any more, `spend` with the
    bytes of each probe before it is sent: it may refuse them.
    """
    expected = tuple(bounds_of(task, manifest.preprocessing.crop) for task in manifest.tasks)
    clouds = config.clouds if config.mode != "edge" else ()
    each = config.probe_bytes_per_hour / max(len(clouds), 1)
    replicas = Replicas(
        [
            Link(cloud, fingerprint, expected, config.tls, config.breaker, late, probes=ProbeSchedule(each, spend))
            for cloud in clouds
        ]
    )
    replicas.wait_probed(config.connect_s)
    return replicas
