"""Photos as fast as a service answers them, at as little cost as possible beside it: messages packed before the start.

Each device is a channel of its own with one stream, over which a new photo goes out when an answer comes in. Nothing
is sent again: a stream that breaks ends the run. For what devices do when clouds fail see `photo_load`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np

from isthmus.models.messages import CloudRequest, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

METHOD = "/isthmus.v1.Isthmus/InferStream"
DEADLINE_S = 60.0


class Device:
    """One channel with one stream, and `in_flight` photos on it."""

    def __init__(self, target: str, messages: Sequence[bytes], in_flight: int, stop_s: float) -> None:
        """`messages` have the ids 1, 2, … and are sent in turn until `stop_s`; there must be more than in flight."""
        self._channel = grpc.aio.insecure_channel(
            target, [*limits.client_options(), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._messages, self._in_flight, self._stop_s = messages, in_flight, stop_s
        self._sent = asyncio.Semaphore(in_flight)
        self.arrived_s: list[float] = []

    async def run(self) -> None:
        """Until every photo is answered. Raises RuntimeError for an error in an answer, grpc.RpcError."""
        call: Any = self._channel.stream_stream(METHOD, None, pb.InferResponse.FromString)(self._requests())
        outstanding = 0
        async with self._channel:
            async for response in call:
                if response.HasField("error"):
                    raise RuntimeError(response.error.message)
                outstanding += 1
                self.arrived_s.append(time.monotonic())
                self._sent.release()

    async def _requests(self) -> AsyncIterator[bytes]:
        number = 0
        while time.monotonic() < self._stop_s:
            await self._sent.acquire()
            yield self._messages[number % len(self._messages)]
            number += 1


def pack(bundle: Bundle, payloads: Sequence[Payload], count: int) -> list[bytes]:
    """`count` messages, the payloads in turn."""
    requests = (CloudRequest(n + 1, bundle.fingerprint, DEADLINE_S, payloads[n % len(payloads)]) for n in range(count))
    return [wire.pack_request(request).SerializeToString() for request in requests]


async def rate(
    targets: Sequence[str], messages: Sequence[bytes], in_flight: int, settle_s: float, run_s: float
) -> float:
    """Answers a second to devices, one for each of `targets`, in the `run_s` seconds after the first `settle_s`."""
    started_s = time.monotonic()
    devices = [Device(target, messages, in_flight, started_s + settle_s + run_s) for target in targets]
    await asyncio.gather(*(device.run() for device in devices))
    arrived_s = np.concatenate([device.arrived_s for device in devices]) - started_s - settle_s
    return float(np.count_nonzero((arrived_s >= 0) & (arrived_s < run_s)) / run_s)
