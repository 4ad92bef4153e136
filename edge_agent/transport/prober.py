"""A thread that asks a cloud for signs of life: probes while the circuit breaker is open, checks of a suspected one.

It also measures a link that requests do not measure, and half-closes streams that nobody uses.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from isthmus.edge_agent.policy.estimates import Probe
from isthmus.edge_agent.transport import health
from isthmus.edge_agent.transport.channel import GRPC_PREFIX_BYTES, rpc_error
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.edge_agent.transport.health import CloudHealth
from isthmus.models.errors import IsthmusError, LinkDown
from isthmus.models.messages import ServiceInfo, TokenizerInfo
from isthmus.protos import limits, wire_describe
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

IDLE_CHECK_S = limits.IDLE_STREAM_S / 2
PROBE_BYTES = 8192  # each way, enough to measure the bandwidth of a thin link: 33 ms at 2 Mbit/s
PROBES = ((0, 0), (PROBE_BYTES, 0), (0, PROBE_BYTES))  # padding up and down of the messages that measure a link
REQUEST_BYTES, DESCRIPTION_BYTES = 16, 2048  # of a message without padding; of a reply, until one was seen
OUT_OF_BUDGET = "the budget for bytes allows no probe now"
FETCH_TIMEOUT_S = 300.0  # of a tokenizer: the largest that is usual, 17 MB, over half a megabit/s

FetchTokenizer = Callable[[TokenizerInfo], bytes]


class Match(Protocol):
    """What an agent wants of a cloud. Called from the prober's thread, `lost` from any."""

    def check(self, info: ServiceInfo, fetch: FetchTokenizer) -> None:
        """Look at what the cloud holds. Raises IsthmusError where that does not serve this agent.

        `fetch` gets a tokenizer that the cloud declares, verified. It raises LinkError, ServiceError.
        """

    def lost(self) -> None:
        """The cloud cannot be used until it is checked again."""


class Prober:
    """Starts at once."""

    def __init__(
        self,
        stub: CloudStub,
        match: Match,
        cloud: CloudHealth,
        retire_idle: Callable[[], None],
        explain: Callable[[str], str | None] = lambda text: None,
    ) -> None:
        """`match` says whether the cloud may be used. `retire_idle` is called now and then.

        `explain` turns the text of a connection that failed into plain words, where it can.
        """
        self._stub, self._match, self._cloud, self._retire_idle = stub, match, cloud, retire_idle
        self._explain = explain
        self._probed = threading.Event()
        self._closed = False
        self._description_bytes = DESCRIPTION_BYTES
        self._fetching: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name="isthmus-probe", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for the first probe."""
        self._probed.wait(timeout_s)

    def alive(self, timeout_s: float) -> bool:
        """Whether the cloud answers a Describe within `timeout_s`, which tells a slow cloud from a lost one."""
        try:
            self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return True

    def close(self) -> None:
        """End the thread, and what it fetches."""
        self._closed = True
        if (fetching := self._fetching) is not None:
            fetching.cancel()
        self._cloud.wake.set()
        self._thread.join(health.PROBE_TIMEOUT_S + 1)

    def _run(self) -> None:
        while not self._closed:
            wait_s = self._cloud.probe_wait_s()
            self._retire_idle()
            if wait_s <= 0:
                self._probe()
            elif self._cloud.take_check():
                self._check()
            elif self._cloud.take_probe(self._measuring_bytes):
                self._measure()
            elif self._cloud.wake.wait(min(wait_s, IDLE_CHECK_S) * random.uniform(0.9, 1.1)):  # spread many devices'
                self._cloud.wake.clear()

    def _check(self) -> None:
        """Ask a cloud that may be lost for a sign of life. Without one the breaker opens."""
        try:
            self._match.check(self._describe()[0], self._fetch)
        except IsthmusError as error:
            self._cloud.trip(str(error))

    def _measure(self) -> None:
        """Measure a link whose estimate is old, or that has changed."""
        try:
            measured = [self._describe(up, down)[1] for up, down in PROBES]
        except IsthmusError as error:
            self._cloud.record_failure(str(error))
        else:
            self._cloud.record_measured(measured)

    def _probe(self) -> None:
        try:
            if not self._cloud.may_spend(REQUEST_BYTES + self._description_bytes):
                raise LinkDown(OUT_OF_BUDGET)
            info, _ = self._describe()  # connects: the set-up would count as round trip
            self._match.check(info, self._fetch)
            measure = self._cloud.take_probe(self._measuring_bytes, needed=True)
            measured = [self._describe(up, down)[1] for up, down in PROBES if measure]
        except IsthmusError as error:
            self._match.lost()
            self._cloud.record_probe(self._explain(str(error)) or str(error))
        else:
            self._cloud.record_probe(None, measured)
        self._probed.set()

    @property
    def _measuring_bytes(self) -> int:
        """Bytes of all messages that measure a link, and of their replies."""
        return sum(up + down + REQUEST_BYTES + self._description_bytes for up, down in PROBES)

    def _describe(self, padding: int = 0, reply_bytes: int = 0) -> tuple[ServiceInfo, Probe]:
        """What the cloud says of itself, and what it took to ask it."""
        request = pb.DescribeRequest(padding=random.randbytes(padding), reply_bytes=reply_bytes)
        up_bytes = request.ByteSize() + GRPC_PREFIX_BYTES
        ahead_bytes = self._cloud.record_sent(up_bytes)
        started_s = time.monotonic()
        try:
            message = self._stub.Describe(request, timeout=health.PROBE_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise rpc_error(failure) from failure
        elapsed_s = time.monotonic() - started_s
        down_bytes = message.ByteSize() + GRPC_PREFIX_BYTES
        self._description_bytes = down_bytes - len(message.padding)
        return wire_describe.unpack_service(message), Probe(elapsed_s, up_bytes + ahead_bytes, down_bytes)

    def _fetch(self, info: TokenizerInfo) -> bytes:
        """The tokenizer that the cloud declares, verified."""
        parts = self._stub.Tokenizer(pb.TokenizerRequest(sha256=info.sha256), timeout=FETCH_TIMEOUT_S)
        self._fetching = parts
        try:
            return wire_describe.unpack_tokenizer(parts, info)
        except grpc.RpcError as failure:
            raise rpc_error(failure) from failure
        finally:
            self._fetching = None
            parts.cancel()
