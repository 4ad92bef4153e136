"""The methods of a cloud over one channel, which a new one replaces when certificates or the token are renewed.

files change -> a channel with the new ones; calls under way end on the old one, which is closed after the last
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.transport.channel import open_channel
from isthmus.models.errors import InvalidInput
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

log = logging.getLogger("isthmus.edge")


class OpenChannel:
    """One channel and the calls that use it."""

    def __init__(self, target: str, tls: Tls | None) -> None:
        """Raises InvalidInput for a file of `tls`."""
        self._channel = open_channel(target, tls)
        self._stub = pb_grpc.IsthmusStub(self._channel)
        self._lock = threading.Lock()
        self._calls = 0
        self._retired = False
        token = tls.secret if tls is not None and tls.on else ""
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None

    def enter(self) -> OpenChannel:
        """One call more will begin."""
        with self._lock:
            self._calls += 1
        return self

    def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """Begin a call whose answers are a stream."""
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        if not call.add_callback(self._ended):
            self._ended()
        return call

    def ask(self, method: str, request: Any, timeout_s: float) -> Any:
        """The answer to one request. Raises grpc.RpcError."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        finally:
            self._ended()

    def retire(self) -> None:
        """Close it when its last call has ended."""
        with self._lock:
            self._retired = True
            unused = self._calls == 0
        if unused:
            self._channel.close()

    def close(self) -> None:
        self._channel.close()

    def _ended(self) -> None:
        with self._lock:
            self._calls -= 1
            unused = self._retired and self._calls == 0
        if unused:
            # not in the thread of gRPC that tells of the end, which closing would wait for
            threading.Thread(target=self._channel.close, name="isthmus-close", daemon=True).start()


class CloudStub:
    """Has the methods of `IsthmusStub` that a device uses. Safe to call from several threads."""

    def __init__(self, target: str, tls: Tls | None) -> None:
        """Does not connect yet. Raises InvalidInput for a file of `tls`."""
        self._target, self._tls = target, tls
        self._lock = threading.Lock()  # no channel is retired between its choice and the beginning of a call
        self._seen = stamp_of(tls)
        self._open = OpenChannel(target, tls)

    def renew(self) -> bool:
        """Open a channel anew where files of TLS have changed. Whether later calls go over another one.

        Files that cannot be used change nothing, and are logged once: another may still be on its way.
        """
        if (found := stamp_of(self._tls)) == self._seen:
            return False
        self._seen = found
        try:
            renewed = OpenChannel(self._target, self._tls)
        except InvalidInput as error:
            log.warning("the renewed certificate or token is not used: %s", error)
            return False
        with self._lock:
            former, self._open = self._open, renewed
        former.retire()
        return True

    def InferStream(self, requests: Iterator[pb.InferRequest]) -> Any:
        return self._enter().call("InferStream", requests)

    def Generate(self, requests: Iterator[pb.GenerateRequest]) -> Any:
        return self._enter().call("Generate", requests)

    def Tokenizer(self, request: pb.TokenizerRequest, timeout: float) -> Any:
        return self._enter().call("Tokenizer", request, timeout)

    def Describe(self, request: pb.DescribeRequest, timeout: float) -> pb.DescribeResponse:
        answer: pb.DescribeResponse = self._enter().ask("Describe", request, timeout)
        return answer

    def close(self) -> None:
        self._open.close()

    def _enter(self) -> OpenChannel:
        with self._lock:
            return self._open.enter()


def stamp_of(tls: Tls | None) -> object:
    """What changes when a file of `tls` does."""
    if tls is None or not tls.on:
        return None
    from isthmus.protos.certificates import stamp  # cryptography takes 80 ms to import

    return stamp((tls.ca, tls.certificate, tls.key, tls.token_file))
