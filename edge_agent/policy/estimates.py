"""Estimates of the link to one cloud, and of the queue there, with their uncertainty and age. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from isthmus.edge_agent.policy.averages import Average, GuardedAverage
from isthmus.edge_agent.policy.changes import FIRST_SPREAD, ChangeTest, Verdict

FORGET = 0.98  # the weight of an observation halves after 34 others
FORGET_S = 120.0  # and after so many seconds without one
MEMORY_BYTES2 = 1000.0**2  # variance of sizes below which the old bandwidth counts more than new observations
RESOLVED_BYTES2 = 100.0**2  # variance of sizes below which they say nothing about bandwidth
LIMIT = 4.0  # predictions to which an observation is clipped, of a size unlike those before: it may be a stall
GUARDED_WEIGHT = 1.5  # of observations, from which the test for changes begins: after a small and a large probe
RECENT = 16  # observations kept, of which the fit starts over after a change
DRIFT = 0.03  # relative standard deviation that the link gains in a second, ten times that in a hundred: a random walk
DOWN_BYTES = 4096  # by which a probe's reply must be larger than another's to measure the downlink
LOSS_WEIGHT, REPLY_WEIGHT = 0.05, 0.05  # of one request in the share that is lost, and in the usual size of a reply
QUEUE_WEIGHT, QUEUE_FORGET_S = 0.3, 10.0  # of one reply in the cloud's queue, which halves in so many seconds unseen
LEAST_SLOPE, LEAST_S = 1e-10, 1e-9  # seconds a byte (80 Gbit/s), seconds of an exchange: they keep logarithms finite


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """An upload of b bytes is answered after `transfer_s(b)`, without the cloud's own time.

    bytes_per_s, down_bytes_per_s: bandwidth up and down. reply_bytes: of a usual reply. ahead_bytes: of earlier uploads
    that are still being sent. queue_s: that the cloud lets a request wait. spread: relative standard deviation of
    `transfer_s`; it grows with age. loss: share of requests without a reply. age_s: since the last measurement.
    """

    rtt_s: float
    bytes_per_s: float
    down_bytes_per_s: float = math.inf
    reply_bytes: float = 0.0
    ahead_bytes: float = 0.0
    queue_s: float = 0.0
    spread: float = FIRST_SPREAD
    loss: float = 0.0
    age_s: float = math.inf

    def transfer_s(self, up_bytes: float) -> float:
        """Predicted seconds from sending `up_bytes` to the reply, without the cloud's own time."""
        up_s = (self.ahead_bytes + up_bytes) / self.bytes_per_s
        return self.rtt_s + up_s + self.reply_bytes / self.down_bytes_per_s

    def reply_s(self, up_bytes: float) -> float:
        """`transfer_s`, and the wait in the cloud's queue."""
        return self.transfer_s(up_bytes) + self.queue_s


class Probe(NamedTuple):
    """A message that was sent only to measure: the seconds until its reply, and the bytes of both."""

    seconds: float
    up_bytes: float
    down_bytes: float


class Fit:
    """Least squares of seconds over bytes, with exponential forgetting.

    Sizes that are about equal carry no information about the slope; they leave it and move only the mean.
    """

    def __init__(self, slope: float) -> None:
        self.slope = slope  # seconds a byte
        self.restart(slope)

    def restart(self, slope: float) -> None:
        """Forget what was observed; until sizes differ the slope is `slope`."""
        self.slope = max(slope, LEAST_SLOPE)
        self.weight = self._bytes = self._seconds = 0.0  # decayed weight and means
        self._bytes2 = self._bytes_seconds = 0.0  # decayed central sums

    def fade(self, share: float) -> None:
        """Let what was observed count less."""
        self.weight, self._bytes2 = self.weight * share, self._bytes2 * share
        self._bytes_seconds *= share

    def observe(self, size: float, seconds: float) -> None:
        self.weight = FORGET * self.weight + 1
        step_bytes = size - self._bytes
        self._bytes += step_bytes / self.weight
        step_seconds = seconds - self._seconds
        self._seconds += step_seconds / self.weight
        self._bytes2 = FORGET * self._bytes2 + step_bytes * (size - self._bytes)
        self._bytes_seconds = FORGET * self._bytes_seconds + step_bytes * (seconds - self._seconds)
        slope = (self._bytes_seconds + MEMORY_BYTES2 * self.slope) / (self._bytes2 + MEMORY_BYTES2)
        self.slope = max(slope, LEAST_SLOPE)

    @property
    def base_s(self) -> float:
        """Seconds of an upload without bytes."""
        return max(self._seconds - self.slope * self._bytes, 0.0)

    def predict_s(self, size: float) -> float:
        """Predicted seconds of an upload."""
        return max(self.base_s + self.slope * size, LEAST_S)

    def leverage(self, size: float) -> float:
        """Variance of the prediction, in variances of one observation: large for a size unlike those before."""
        return 1 / max(self.weight, 1e-9) + (size - self._bytes) ** 2 / (self._bytes2 + RESOLVED_BYTES2)


class LinkEstimator:
    """What exchanges and probes say about one link. Starts at a prior, and leaves it with the first observation.

    An upload that waits for earlier ones of this device counts their bytes too: a queue is not a slow link.
    """

    def __init__(self, prior: LinkEstimate = LinkEstimate(rtt_s=0.05, bytes_per_s=250_000)) -> None:
        self._prior = prior
        self._fit = Fit(1 / prior.bytes_per_s)
        self._test = ChangeTest()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._down = GuardedAverage(0.0)  # seconds a byte of a reply; in the round trip until it is measured
        self._reply_bytes = Average(prior.reply_bytes, REPLY_WEIGHT)
        self._queue_s, self._replied_s = prior.queue_s, -math.inf
        self._loss = prior.loss
        self._free_s = -math.inf  # when what was sent will have left the device
        self._observed_s = -math.inf
        self.changes = 0  # of the link, found so far

    def sent(self, up_bytes: float, now_s: float) -> float:
        """A message is sent. Returns the bytes of earlier ones that are predicted to be still on their way up."""
        ahead_s = max(self._free_s - now_s, 0.0)
        self._free_s = now_s + ahead_s + up_bytes * self._fit.slope
        return ahead_s / self._fit.slope

    def observe(
        self, up_bytes: float, seconds: float, now_s: float, *, down_bytes: float = 0.0, ahead_bytes: float = 0.0
    ) -> None:
        """One exchange: bytes sent, and seconds until the reply less the cloud's own time.

        `ahead_bytes`: what `sent` returned. Ignored unless `seconds` are positive: the cloud then claims more time than
        there was.
        """
        if not seconds > 0:
            return
        self._loss -= LOSS_WEIGHT * self._loss
        if self._fit.weight:
            self._fit.fade(0.5 ** (max(now_s - self._observed_s, 0.0) / FORGET_S))
        size, up_s = up_bytes + ahead_bytes, max(seconds - down_bytes * self._down.value, 0.1 * seconds, LEAST_S)
        predicted_s, weight = self._fit.predict_s(size), self._fit.weight
        self._recent.append((size, up_s))
        verdict: Verdict = "usual"
        if weight >= GUARDED_WEIGHT:
            verdict = self._test.observe(math.log(up_s / predicted_s), math.sqrt(1 + self._fit.leverage(size)))
            up_s = min(up_s, LIMIT * predicted_s)
        if verdict == "changed":
            self._start_over()
        elif verdict == "usual":
            self._fit.observe(size, up_s)
        if verdict != "outlier":
            self._observed_s = now_s

    def measure(self, probes: Sequence[Probe], now_s: float) -> None:
        """Probes of different sizes, sent one after another."""
        for probe in probes:
            if probe.down_bytes - probes[0].down_bytes >= DOWN_BYTES:
                slope = (probe.seconds - probes[0].seconds) / (probe.down_bytes - probes[0].down_bytes)
                self._down.observe(max(slope, LEAST_SLOPE))
        for probe in probes:
            if probe.down_bytes - probes[0].down_bytes < DOWN_BYTES:
                self.observe(probe.up_bytes, probe.seconds, now_s, down_bytes=probe.down_bytes)

    def replied(self, down_bytes: float, queue_s: float, now_s: float) -> None:
        """A request's reply: its bytes, and the seconds that the request waited in the cloud."""
        self._reply_bytes.observe(down_bytes)
        self._queue_s = self._queue(now_s) + QUEUE_WEIGHT * (queue_s - self._queue(now_s))
        self._replied_s = now_s

    def lost(self) -> None:
        """A request remained without a reply."""
        self._loss += LOSS_WEIGHT * (1 - self._loss)

    def at(self, now_s: float) -> LinkEstimate:
        """The estimate now; the prior before the first observation."""
        slope, known, age_s = self._fit.slope, self._fit.weight > 0, max(now_s - self._observed_s, 0.0)
        variance = self._test.spread**2 * (1 + 1 / max(self._fit.weight, 1.0))
        return LinkEstimate(
            rtt_s=self._fit.base_s if known else self._prior.rtt_s,
            bytes_per_s=1 / slope,
            down_bytes_per_s=1 / self._down.value if self._down.value else math.inf,
            reply_bytes=self._reply_bytes.value,
            ahead_bytes=max(self._free_s - now_s, 0.0) / slope,
            queue_s=self._queue(now_s),
            spread=math.sqrt(variance + (DRIFT**2 * age_s if known else 0.0)),
            loss=self._loss,
            age_s=age_s,
        )

    def _queue(self, now_s: float) -> float:
        """Seconds that the cloud lets a request wait: the less, the longer ago that was seen."""
        return self._queue_s * math.exp2(-max(now_s - self._replied_s, 0.0) / QUEUE_FORGET_S)

    def _start_over(self) -> None:
        """Keep only what was observed since the change. Until sizes differ, all of the link has changed alike."""
        latest = list(self._recent)[-self._test.run :]
        ratio = median(seconds / self._fit.predict_s(size) for size, seconds in latest)
        self._fit.restart(self._fit.slope * ratio)
        self._down = GuardedAverage(self._down.value)
        for size, seconds in latest:
            self._fit.observe(size, seconds)
        self.changes += 1
