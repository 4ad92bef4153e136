"""The agent's router in a simulated world, with its real policy, cost model, link estimates and circuit breaker.

What is replayed is what they decide about: the head's confidences, payloads' bytes, answers, and every stage's seconds.
A photo goes through the steps of `EdgeAgent`; the prober's through those of `Prober`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.exits import Goal, OperatingPoint, RoutePlan
from isthmus.edge_agent.transport.health import PROBE_TIMEOUT_S, Attempt, CloudHealth
from isthmus.edge_agent.transport.prober import PROBE_BYTES
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.request import Overrides, RequestState, resolve_request
from isthmus.edge_agent.vision.router import Router, certified_threshold, exit_confidence, exit_shares
from isthmus.models.errors import DeadlineExceeded, IsthmusError
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.manifest import Manifest
from tests.bench.router_world import Clock, Outcome, Way, World, simulated, way_name

DESCRIBE_BYTES = 20  # a probe's request without padding, and an answer of a few hundred
DESCRIBED_BYTES = 400


@dataclass
class Probes:
    """The prober of one cloud: what `Prober` does, at the times of the simulated clock."""

    world: World
    health: CloudHealth
    clock: Clock
    _done: list[tuple[float, str | None, list[tuple[float, int]]]] = field(default_factory=list)

    def run_until(self, until_s: float) -> None:
        """Everything that is due up to a time, in order. The clock ends there."""
        while True:
            due_s = self._done[0][0] if self._done else self.clock.now_s + max(self.health.probe_wait_s(), 0.0)
            if due_s > until_s or (not self._done and self.health.state != "open"):
                break
            self.clock.now_s = max(self.clock.now_s, due_s)
            self._finish() if self._done else self._start()
        self.clock.now_s = max(self.clock.now_s, until_s)
        if not self._done and self.health.take_check() and self._describe(self.clock.now_s, 0) is None:
            self.health.trip("the cloud is not answering")

    def _start(self) -> None:
        """A connection, and two measurements of other sizes; or none in time."""
        ends_s, measured = self.clock.now_s, []
        for padding in (0, 0, PROBE_BYTES):
            seconds = self._describe(ends_s, padding)
            if seconds is None:
                self._done = [(ends_s + PROBE_TIMEOUT_S, "the cloud is not answering", [])]
                return
            ends_s += seconds
            measured.append((seconds, DESCRIBE_BYTES + padding))
        self._done = [(ends_s, None, measured[1:])]

    def _finish(self) -> None:
        _, refusal, measured = self._done.pop()
        self.health.record_probe(refusal, measured)

    def _describe(self, now_s: float, padding: int) -> float | None:
        """Seconds of one, or None without a reply in time."""
        arrived_s = self.world.arrives(now_s, DESCRIBE_BYTES + padding, 0)
        seconds = self.world.arrives(arrived_s, DESCRIBED_BYTES, 0) - now_s
        return seconds if seconds <= PROBE_TIMEOUT_S else None


class SimulatedAgent:
    """One agent in one world. Photos are answered one at a time."""

    def __init__(self, world: World, manifest: Manifest, config: EdgeConfig, clock: Clock) -> None:
        self._world, self._config, self._clock = world, config, clock
        head = manifest.heads[config.precision]
        self._exits = [each.name for each in head.exits]
        self.costs = Costs(manifest, config.prices)
        self._goal = Goal(config.objective, exit_confidence(head.thresholds, config.epsilon))
        self.costs.expect_exits(exit_shares(certified_threshold(head.thresholds, config.epsilon), len(self._exits)))
        self._router = Router(self.costs, self._exits)
        self._request = resolve_request(self.costs.points, manifest, config, None, Overrides())
        self._health = CloudHealth(config.breaker)
        self._probes = Probes(world, self._health, clock)
        self._form = f"{config.whole_image.form} {config.whole_image.quality}".replace("png 75", "png")
        self._warm_up()

    def _warm_up(self) -> None:
        """Each graph is run before the first photo, and the cloud is found."""
        for run in range(2):
            for index, segment_s in enumerate(self.costs.segment_s):
                segment_s.calibrate(self._world.segment_s(index, run))
            for tap, widths in enumerate(self.costs.encode_s):
                for width, encode_s in enumerate(widths):
                    encode_s.calibrate(self._world.encode_s(OperatingPoint(tap, width, 0), run))
        self._probes.run_until(self._clock.now_s + self._config.connect_s)

    def answer(self, photo: int, arrives_s: float) -> Outcome:
        """One photo that arrives then, or has waited since."""
        self._probes.run_until(max(arrives_s, self._clock.now_s))
        state = RequestState(self._request, self._config.deadline_s)
        self._spend(state, "decode", self._world.decode_s(photo))
        step = self._next(state)
        while step.route == "continue":
            self._run_segment(state, photo)
            step = self._next(state)
        if step.route in ("split", "offload"):
            return self._send(state, photo, step)
        return self._locally(state, photo, late=step.route == "fallback")

    def _next(self, state: RequestState) -> RoutePlan:
        self._probes.run_until(self._clock.now_s)
        usable = self._health.state != "open"
        estimate = self._health.estimate if usable else None
        refused = None if usable else self._health.refusal or "the cloud is not answering"
        return self._router.next(state, self._config.mode, self._goal, estimate, refused)

    def _run_segment(self, state: RequestState, photo: int) -> None:
        index = len(state.exits)
        self._router.head_ran()
        seconds = self._world.segment_s(index, photo)
        self._spend(state, "head", seconds)
        state.exits.append(self._world.recording.exits_NEK[photo, index].astype(np.float32))
        self.costs.segment_s[index].observe(seconds)

    def _send(self, state: RequestState, photo: int, step: RoutePlan) -> Outcome:
        way: Way = step.point or self._form
        seconds, size = self._world.encode_s(way, photo), self._world.size(way, photo)
        self._spend(state, "encode", seconds)
        if isinstance(way, str):
            payload = Payload(Codec.IMAGE, 0, 0, bytes(size))
            self.costs.image_encode_s.observe(seconds)
            self.costs.image_bytes.observe(size)
        else:
            payload = Payload(Codec.BOTTLENECK, way.tap, way.rate, bytes(size))
            self.costs.encode_s[way.tap][way.width].observe(seconds)
            self.costs.point_bytes[way].observe(size)
        try:
            self._exchange(state, photo, way, payload)
        except IsthmusError:
            return self._locally(state, photo, late=True)
        return self._outcome(state, photo, way_name(way), self._world.answer(way, photo))

    def _exchange(self, state: RequestState, photo: int, way: Way, payload: Payload) -> None:
        """Wait for the reply. Raises LinkDown, Overloaded, or DeadlineExceeded when it is late."""
        attempt = Attempt(self._router.cloud_left_s(state))
        self._health.admit(attempt.budget_s)
        attempt.admitted()
        attempt.sent(len(payload.data))
        state.add_up_bytes(len(payload.data))
        sent_s = self._clock.now_s
        reply_s, cloud_s = self._world.replies(sent_s, way, photo)
        if reply_s > sent_s + attempt.budget_s:
            self._probes.run_until(sent_s + attempt.budget_s)
            error = DeadlineExceeded("the cloud is late")
            self._health.record_error(error, attempt)
            raise error
        self._probes.run_until(reply_s)
        self._router.replied()
        self._health.record_answer(len(payload.data), reply_s - sent_s - cloud_s)
        self.costs.record_cloud(payload, cloud_s)

    def _locally(self, state: RequestState, photo: int, late: bool) -> Outcome:
        if not state.exits:
            self._run_segment(state, photo)
        name = self._exits[len(state.exits) - 1]
        return self._outcome(state, photo, name, int(state.exits[-1].argmax()), late)

    def _outcome(self, state: RequestState, photo: int, way: str, answer: int, late: bool = False) -> Outcome:
        seconds = self._clock.now_s - state.started_s
        return Outcome(photo, state.started_s, seconds, way, answer, state.up_bytes, late)

    def _spend(self, state: RequestState, stage: str, seconds: float) -> None:
        with state.stage(stage):
            self._clock.sleep(seconds)


def arrivals(world: World, photos: int, period_s: float) -> Iterator[tuple[int, float]]:
    """Photos in turn, one every `period_s`, and when each arrives."""
    return ((index % len(world.recording), index * period_s) for index in range(photos))


def route(world: World, manifest: Manifest, config: EdgeConfig, photos: int, period_s: float) -> list[Outcome]:
    """What the router does with a stream of photos."""
    clock = Clock(-config.connect_s)
    with simulated(clock):
        agent = SimulatedAgent(world, manifest, config, clock)
        clock.now_s = 0.0
        return [agent.answer(photo, arrives_s) for photo, arrives_s in arrivals(world, photos, period_s)]
