"""The agent's router in a simulated world, with its real policy, cost model, link estimates and circuit breaker.

What is replayed is what they decide about: the head's confidences, payloads' bytes, answers, and every stage's seconds.
A photo goes through the steps of `EdgeAgent`; probes through those of `Prober`. Certificates are taken as valid.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.ledger import Ledger, Moment
from isthmus.edge_agent.policy.estimates import Probe
from isthmus.edge_agent.policy.exits import OperatingPoint, RoutePlan
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.radio import Radio, probe_charge
from isthmus.edge_agent.transport.health import NOT_ANSWERING, PROBE_TIMEOUT_S, Attempt, CloudHealth
from isthmus.edge_agent.transport.prober import OUT_OF_BUDGET, PROBES
from isthmus.edge_agent.vision.charges import Charges
from isthmus.edge_agent.vision.costs import Costs, Reply
from isthmus.edge_agent.vision.exit_rule import certified, exit_rule, exit_shares
from isthmus.edge_agent.vision.request import Overrides, RequestState, image_of, images_of, resolve_request
from isthmus.edge_agent.vision.router import Router, goal_of
from isthmus.models.errors import DeadlineExceeded, IsthmusError, LinkDown
from isthmus.models.messages import CloudReply, Codec, Payload
from isthmus.models.vision.manifest import ImageWay, Manifest
from tests.bench.router_world import (
    FRAMING_BYTES,
    HTTP2_BYTES,
    REPLY_BYTES,
    Clock,
    Outcome,
    Way,
    World,
    simulated,
    way_name,
)

DESCRIBE_BYTES = 20  # a probe's request without padding, and an answer of a few hundred
DESCRIBED_BYTES = 400
PROBING_BYTES = sum(up + down + DESCRIBE_BYTES + DESCRIBED_BYTES for up, down in PROBES)
ROUNDING_S = 1e-9

Work = Generator[float, None, None]  # gives the time when it goes on


@dataclass
class Uplink:
    """The device's side of the link: one message after another. One that is given up leaves the link at once."""

    world: World
    _free_s: float = float("-inf")

    def send(self, now_s: float, size: int, photo: int) -> float:
        """When a message that is sent now has arrived."""
        self._free_s, arrived_s = self.world.delivers(max(now_s, self._free_s), size, photo)
        return arrived_s

    def give_up(self, now_s: float) -> None:
        self._free_s = min(self._free_s, now_s)


class Probes:
    """The prober of one cloud: what `Prober` does, at the times of the simulated clock."""

    def __init__(self, uplink: Uplink, health: CloudHealth, clock: Clock) -> None:
        self._uplink, self._health, self._clock = uplink, health, clock
        self._work: Work | None = None
        self._due_s = 0.0  # when the work goes on

    def run_until(self, until_s: float) -> None:
        """Everything that is due up to a time, in order. The clock ends there."""
        while (due_s := self._next_s()) <= until_s:
            self._clock.now_s = max(self._clock.now_s, due_s)
            self._work = self._work or self._probe()
            following_s = next(self._work, None)
            if following_s is None:
                self._work = None
            else:
                self._due_s = following_s
        self._clock.now_s = max(self._clock.now_s, until_s)

    def _next_s(self) -> float:
        """When there is something to do."""
        if self._work is None:
            if self._health.probe_wait_s() <= ROUNDING_S:
                self._work = self._probe()
            elif self._health.take_check():
                self._work = self._check()
            elif self._health.take_probe(PROBING_BYTES):
                self._work = self._measure()
            else:
                return self._clock.now_s + self._health.probe_wait_s()
            self._due_s = self._clock.now_s
        return self._due_s

    def _probe(self) -> Work:
        try:
            if not self._health.may_spend(DESCRIBE_BYTES + DESCRIBED_BYTES):
                raise LinkDown(OUT_OF_BUDGET)
            yield from self._describe(0, 0)
            measured = []
            if self._health.take_probe(PROBING_BYTES, needed=True):
                measured = yield from self._measured()
        except IsthmusError as error:
            self._health.record_probe(str(error))
        else:
            self._health.record_probe(None, measured)

    def _check(self) -> Work:
        try:
            yield from self._describe(0, 0)
        except IsthmusError as error:
            self._health.trip(str(error))

    def _measure(self) -> Work:
        try:
            measured = yield from self._measured()
        except IsthmusError as error:
            self._health.record_failure(str(error))
        else:
            self._health.record_measured(measured)

    def _measured(self) -> Generator[float, None, list[Probe]]:
        found = []
        for up, down in PROBES:
            found.append((yield from self._describe(up, down)))
        return found

    def _describe(self, padding: int, reply_bytes: int) -> Generator[float, None, Probe]:
        """One message and its reply. Raises DeadlineExceeded without one in time."""
        sent_s, up_bytes = self._clock.now_s, DESCRIBE_BYTES + padding
        down_bytes = DESCRIBED_BYTES + reply_bytes
        ahead_bytes = self._health.record_sent(up_bytes)
        arrived_s = self._uplink.send(sent_s, up_bytes, 0)
        reply_s = self._uplink.world.arrives(arrived_s, down_bytes, 0)
        yield min(reply_s, sent_s + PROBE_TIMEOUT_S)
        if reply_s > sent_s + PROBE_TIMEOUT_S:
            self._uplink.give_up(self._clock.now_s)
            raise DeadlineExceeded(NOT_ANSWERING)
        return Probe(reply_s - sent_s, up_bytes + ahead_bytes, down_bytes)


class SimulatedAgent:
    """One agent in one world. Photos are answered one at a time."""

    def __init__(self, world: World, manifest: Manifest, config: EdgeConfig, clock: Clock) -> None:
        self._world, self._config, self._clock = world, config, clock
        head = manifest.heads[config.precision]
        self._exits = [each.name for each in head.exits]
        profile = open_profile(config.profile, config.prices)
        self.costs = Costs(manifest, profile, config.precision)
        self._whole = image_of(self.costs.points, config)
        self.costs.send_whole_as(self._whole, images_of(self.costs.points, config))
        self._rule = exit_rule(head, config.epsilon, config.promise, config.among)
        best = certified(head, config.epsilon, config.promise, config.among)
        self.costs.expect_exits(exit_shares(head, best))
        self.ledger = Ledger(config.budgets.budgets, clock=lambda: Moment("simulated", clock.now_s, 0.0))
        self._radio = Radio()
        self._router = Router(self.costs, self._exits, self.ledger, self._radio)
        self._request = resolve_request(self.costs.points, manifest, config, None, Overrides())
        spend = probe_charge(self.ledger, profile, self._radio)
        self._health = CloudHealth(config.breaker, lambda: None, ProbeSchedule(config.probe_bytes_per_hour, spend))
        self._uplink = Uplink(world)
        self._probes = Probes(self._uplink, self._health, clock)
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
        goal = goal_of(self._config, self._rule.confidence(len(state.exits)))
        if self._health.state == "open":
            return self._router.next(state, self._config.mode, goal, None, self._health.refusal or NOT_ANSWERING)
        self._health.planned()
        return self._router.next(state, self._config.mode, goal, self._health.estimate, None)

    def _run_segment(self, state: RequestState, photo: int) -> None:
        index = len(state.exits)
        self._router.head_ran()
        seconds = self._world.segment_s(index, photo)
        self._spend(state, "head", seconds)
        state.exits.append(self._world.recording.exits_NEK[photo, index].astype(np.float32))
        state.score = self._rule.score(state.exits)
        self.costs.segment_s[index].observe(seconds, self._clock.now_s)

    def _send(self, state: RequestState, photo: int, step: RoutePlan) -> Outcome:
        image = self._whole if self._config.mode == "offload" else state.image or self._whole
        way: Way = step.point or form_of(image)
        seconds, size = self._world.encode_s(way, photo), self._world.size(way, photo)
        self._spend(state, "encode", seconds)
        if isinstance(way, str):
            payload = Payload(Codec.IMAGE, 0, 0, bytes(size))
            self.costs.image_encode_s[image.form].observe(seconds)
            self.costs.bytes_of(image).observe(size)
        else:
            payload = Payload(Codec.BOTTLENECK, way.tap, way.rate, bytes(size))
            self.costs.encode_s[way.tap][way.width].observe(seconds, self._clock.now_s)
            self.costs.point_bytes[way].observe(size)
        try:
            self._exchange(state, photo, way, payload)
        except IsthmusError:
            return self._locally(state, photo, late=True)
        return self._outcome(state, photo, way_name(way), self._world.answer(way, photo))

    def _exchange(self, state: RequestState, photo: int, way: Way, payload: Payload) -> None:
        """Wait for the reply; charge it. Raises OverBudget, LinkDown, or DeadlineExceeded when it is late."""
        left_s = self._router.cloud_left_s(state)
        charges = Charges(self.ledger, self.costs, self._radio, lambda: self._router.cloud_left_s(state))
        attempt = Attempt(left_s, lambda up_bytes: None, self._health.record_sent, charges.before_sending)
        self._health.admit(left_s - self._health.estimate.transfer_s(len(payload.data)))
        attempt.admitted()
        try:
            cloud_s, elapsed_s = self._sent(state, photo, way, attempt)
            charges.answered(Reply(REPLY_BYTES - HTTP2_BYTES, cloud_s, elapsed_s))
        except IsthmusError as error:
            self._health.record_error(error, attempt)
            raise
        finally:
            charges.close()
        self._router.replied()
        reply = CloudReply((), 0.0, cloud_s)
        self._health.record_reply(
            reply, elapsed_s, up=attempt.up_bytes, down=REPLY_BYTES - HTTP2_BYTES, ahead=attempt.ahead_bytes
        )
        self.costs.record_cloud(payload, min(cloud_s, elapsed_s))

    def _sent(self, state: RequestState, photo: int, way: Way, attempt: Attempt) -> tuple[float, float]:
        """Send it. Returns the cloud's own seconds, and those until the reply."""
        sent_s, size = self._clock.now_s, self._world.size(way, photo)
        attempt.charge(size + FRAMING_BYTES - HTTP2_BYTES)
        attempt.sent(size + FRAMING_BYTES - HTTP2_BYTES)
        state.add_up_bytes(size)
        reply_s, cloud_s = self._world.answers(self._uplink.send(sent_s, size + FRAMING_BYTES, photo), way, photo)
        self._probes.run_until(min(reply_s, sent_s + attempt.budget_s))
        if reply_s > sent_s + attempt.budget_s:
            self._uplink.give_up(self._clock.now_s)
            raise DeadlineExceeded("the cloud is late")
        attempt.replied = True
        return cloud_s, reply_s - sent_s

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


def form_of(way: ImageWay) -> str:
    """As a recording names it."""
    return way.form if way.form == "png" else f"{way.form} {way.quality}"


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
