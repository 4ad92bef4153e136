"""The world that a simulated agent lives in: a clock, a link and a cloud that change with time, a device's speed.

    Conditions   the link and the cloud at one time
    World        when a message arrives, when a cloud answers, how long a stage takes -> seconds of a walk
    Walk         segments to run, then the way to send, or none: the exit after them answers
    simulated    code of the agent reads this clock instead of the machine's

Stages take what a recording has measured, photo by photo in turn, so that every arm meets the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from isthmus.edge_agent.policy.exits import OperatingPoint
from tests.bench.router_recording import Recording

FRAMING_BYTES = 41  # ours, gRPC's prefix and HTTP/2's frame, a message
REPLY_BYTES = 80
HTTP2_BYTES = 9  # of these, a frame's: no message counts them
PACKET_BYTES = 1460
RETRANSMIT_S = 0.2  # TCP's least timeout: what a lost packet of a short message costs
NEVER_S = 1e9

Way = OperatingPoint | str  # a bottleneck, or the form of a whole image


@dataclass(frozen=True)
class Conditions:
    """The link in each direction, and how many times slower the cloud is. `mbit` 0: nothing passes."""

    mbit: float
    rtt_s: float
    cloud: float = 1.0
    loss: float = 0.0  # share of packets


@dataclass(frozen=True)
class Walk:
    """Segments of the head to run, then what to send; None: the last of them answers."""

    segments: int
    way: Way | None = None


@dataclass(frozen=True)
class Outcome:
    """An answer to one photo. `late`: the cloud did not reply in time, an exit answered in its place."""

    photo: int
    started_s: float
    seconds: float
    way: str
    answer: int
    up_bytes: int
    late: bool = False


@dataclass
class Clock:
    """Seconds since the start."""

    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.0)


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """`time.monotonic` and `time.sleep` are those of `clock`. For one thread."""
    with mock.patch.object(time, "monotonic", clock.monotonic), mock.patch.object(time, "sleep", clock.sleep):
        yield


@dataclass(frozen=True)
class World:
    """`trace`: conditions from each time on, the first from 0. `device`: how many times slower the device is."""

    recording: Recording
    trace: Sequence[tuple[float, Conditions]]
    device: float = 1.0
    deadline_s: float = 2.0

    def at(self, now_s: float) -> Conditions:
        """The conditions at a time."""
        return next((found for start_s, found in reversed(self.trace) if start_s <= now_s), self.trace[0][1])

    def arrives(self, now_s: float, size: int, photo: int) -> float:
        """When a message of `size` bytes that is sent now has arrived."""
        return self.delivers(now_s, size, photo)[1]

    def delivers(self, now_s: float, size: int, photo: int) -> tuple[float, float]:
        """When the last byte of a message that is sent now has left, and when it has arrived."""
        left, begins_s = 8e-6 * size, now_s
        for index, (start_s, found) in enumerate(self.trace):
            end_s = self.trace[index + 1][0] if index + 1 < len(self.trace) else NEVER_S
            if end_s <= begins_s:
                continue
            start_s = max(start_s, begins_s) if index else begins_s
            room_s = end_s - start_s
            if found.mbit and left <= found.mbit * room_s:
                gone_s = start_s + left / found.mbit
                return gone_s, gone_s + found.rtt_s / 2 + self._retransmitted(found, size, photo)
            left -= found.mbit * room_s
        return NEVER_S, NEVER_S

    def _retransmitted(self, found: Conditions, size: int, photo: int) -> float:
        packets = -(-size // PACKET_BYTES)
        unlucky = (photo * 2654435761 + size) % 1000 / 1000 < 1 - (1 - found.loss) ** packets
        return RETRANSMIT_S + found.rtt_s if unlucky else 0.0

    def replies(self, now_s: float, way: Way, photo: int) -> tuple[float, float]:
        """When the reply to a photo that is sent now arrives, and the cloud's own seconds in it."""
        return self.answers(self.arrives(now_s, self.size(way, photo) + FRAMING_BYTES, photo), way, photo)

    def answers(self, arrived_s: float, way: Way, photo: int) -> tuple[float, float]:
        """As `replies`, for a photo that has arrived."""
        cloud_s = self.cloud_s(way, photo, arrived_s)
        overhead_s = pick(self.recording.stages.exchange, photo)
        return self.arrives(arrived_s + cloud_s + overhead_s, REPLY_BYTES, photo), cloud_s

    def cloud_s(self, way: Way, photo: int, now_s: float) -> float:
        stages = self.recording.stages
        samples = stages.cloud_image if isinstance(way, str) else stages.cloud_tap[way.tap]
        return pick(samples, photo) * self.at(min(now_s, NEVER_S)).cloud

    def size(self, way: Way, photo: int) -> int:
        """Bytes of the payload."""
        sent = self.recording.images[way] if isinstance(way, str) else self.recording.points[way]
        return int(sent.bytes_N[photo])

    def answer(self, way: Way, photo: int) -> int:
        """What the cloud answers."""
        sent = self.recording.images[way] if isinstance(way, str) else self.recording.points[way]
        return int(sent.answer_N[photo])

    def exit_answer(self, segments: int, photo: int) -> int:
        return int(self.recording.exits_NEK[photo, segments - 1].argmax())

    def decode_s(self, photo: int) -> float:
        return self.device * pick(self.recording.stages.decode, photo)

    def segment_s(self, index: int, photo: int) -> float:
        return self.device * pick(self.recording.stages.segments[index], photo)

    def encode_s(self, way: Way, photo: int) -> float:
        """Seconds of the encoder and codec, or of the image codec."""
        stages = self.recording.stages
        samples = stages.image_encode[way] if isinstance(way, str) else stages.encode[way.tap][way.width]
        return self.device * pick(samples, photo)

    def walk(self, photo: int, walk: Walk, started_s: float) -> Outcome:
        """One photo, answered that way; by the last exit at the deadline where the cloud is late."""
        ready_s = started_s + self.decode_s(photo)
        ready_s += sum(self.segment_s(index, photo) for index in range(walk.segments))
        if walk.way is None:
            answer = self.exit_answer(walk.segments, photo)
            return Outcome(photo, started_s, ready_s - started_s, f"exit{walk.segments - 1}", answer, 0)
        sent_s = ready_s + self.encode_s(walk.way, photo)
        reply_s, _ = self.replies(sent_s, walk.way, photo)
        up_bytes, name = self.size(walk.way, photo), way_name(walk.way)
        if reply_s - started_s > self.deadline_s:
            answer = self.exit_answer(max(walk.segments, 1), photo)
            return Outcome(photo, started_s, self.deadline_s, name, answer, up_bytes, late=True)
        return Outcome(photo, started_s, reply_s - started_s, name, self.answer(walk.way, photo), up_bytes)


def pick(samples: Sequence[float], photo: int) -> float:
    """The photo's turn of the measured seconds."""
    return samples[photo % len(samples)]


def way_name(way: Way) -> str:
    return way if isinstance(way, str) else f"tap {way.tap} width {way.width} rate {way.rate}"
