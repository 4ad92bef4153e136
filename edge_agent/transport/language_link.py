"""One cloud, as an agent for prompts sees it: a stream for each answer."""

from __future__ import annotations

from weakref import WeakSet

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.transport.cloud_link import CloudLink
from isthmus.edge_agent.transport.generate_stream import BeforeSending, GenerateStream, StreamObservation, allow
from isthmus.edge_agent.transport.prober import Match
from isthmus.models.errors import IsthmusError, LinkDown, Refused


class LanguageLink(CloudLink):
    """Opens `Generate` streams. Safe to call from several threads."""

    def __init__(
        self,
        target: str,
        match: Match,
        tls: Tls | None = None,
        breaker: BreakerLimits = BreakerLimits(),
        *,
        probes: ProbeSchedule | None = None,
    ) -> None:
        """`match` checks what the cloud holds. `probes` says when the link is measured that no answer measures.

        Does not wait for the cloud.
        """
        super().__init__(target, tls, breaker, match.lost, probes)
        self._generating = WeakSet[GenerateStream]()
        self._start(match, self._retire_idle)

    def open_generate_stream(self, vocab: int, before_sending: BeforeSending = allow) -> GenerateStream:
        """Open a `Generate` stream for one answer of a model with so many token ids.

        before_sending: as of GenerateStream. Raises LinkDown while the breaker is open, AgentClosed after `close`.
        """
        self._lifetime.check()
        if (reason := self.unavailable_reason()) is not None:
            raise LinkDown(reason)
        stream = GenerateStream(self._stub, vocab, self._on_reply, before_sending)
        self._generating.add(stream)
        return stream

    def _retire_idle(self) -> None:
        for stream in tuple(self._generating):
            stream.retire_idle()

    def _on_reply(self, reply: StreamObservation | IsthmusError) -> None:
        """Record a reply, or the failure, of a `Generate` stream."""
        if isinstance(reply, Refused):
            self._health.trip(str(reply))
        elif isinstance(reply, IsthmusError):
            self.record_failure(str(reply))
        else:
            self._health.record_answer(reply.up_bytes, reply.elapsed_s)
