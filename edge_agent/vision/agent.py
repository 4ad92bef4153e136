"""The agent for photos: image -> head -> exit, or codec -> link -> answer, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent.config import MAX_DEADLINE_S, MIN_DEADLINE_S, MODES, EdgeConfig
from isthmus.edge_agent.policy.estimates import Exploration
from isthmus.edge_agent.policy.exits import Goal, OperatingPoint, RoutePlan, Situation, describe, plan
from isthmus.edge_agent.transport.link import Link
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.image_input import Photo, as_image
from isthmus.edge_agent.vision.metrics import EdgeMetrics, degraded_reason
from isthmus.edge_agent.vision.payloads import PayloadEncoder
from isthmus.edge_agent.vision.request import Floats, Overrides, RequestState, resolve_request, task_indices
from isthmus.edge_agent.vision.result import Answer, AnswerRoute, build_answer
from isthmus.edge_agent.vision.warm_up import warm_up
from isthmus.models.errors import AgentClosed, InvalidInput, IsthmusError, LinkDown
from isthmus.models.messages import CloudReply, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Threshold

FALLBACK_RESERVE_S = 0.02  # of the deadline, reserved for the device's own answer after a late cloud
EXPLORE_LEFT_S = 0.05  # with less time left no excluded route is explored: hardly any link replies so soon
NEVER = 2.0  # a confidence that no exit reaches
HEAD_IDLE_AT_MOST = 20  # photos; then the head runs once, so that a wrong estimate of its latency is corrected


class EdgeAgent:
    """One device's agent for one vision bundle. Safe to call from several threads. Close it, or use it in `with`."""

    def __init__(self, config: EdgeConfig, metrics: EdgeMetrics | None = None) -> None:
        """Open and verify the bundle, warm up the head, and wait up to `connect_s` for the cloud.

        Raises BundleError, or InvalidInput for settings that contradict each other or the bundle.
        """
        if config.mode not in MODES or (config.mode in ("split", "offload") and config.cloud is None):
            raise InvalidInput(f"mode {config.mode!r} is unknown or needs a cloud, expected one of {', '.join(MODES)}")
        bundle = Bundle.open(config.bundle)
        self.config = config
        self.manifest = bundle.manifest
        task_indices(self.manifest, config.tasks)
        self.metrics = metrics
        self.costs = Costs(bundle.manifest, config.prices)
        self._codecs = [bundle.codec(tap) for tap in range(len(bundle.manifest.taps))]
        self._head = Head(bundle, config.threads, config.precision)
        self._payloads = PayloadEncoder(
            self._head, self._codecs, self.costs, self.manifest.preprocessing.resize, metrics
        )
        described = bundle.manifest.heads[config.precision]
        self._exits = [exit_.name for exit_ in described.exits]
        self.goal = Goal(config.objective, exit_confidence(described.thresholds, config.epsilon))
        self._head_idle = 0  # photos since the head last ran
        self._closed = False
        self._exploration = Exploration(time.monotonic())
        blank_CHW = np.zeros((3, *self.manifest.preprocessing.crop), np.float32)
        warm_up(self._head, self._codecs, self.costs, blank_CHW)
        self.link = self._connect(bundle.fingerprint)

    def __enter__(self) -> EdgeAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to the cloud. Later requests raise AgentClosed."""
        self._closed = True
        if self.link is not None:
            self.link.close()

    def infer(
        self,
        photo: Photo,
        deadline_s: float | None = None,
        *,
        tasks: Sequence[str] | None = None,
        tap: str | None = None,
        width: float | None = None,
        rate: int | None = None,
    ) -> Answer:
        """Answer one photo: a JPEG, PNG or WebP file (path, bytes or file object), a PIL image, or an array of pixels.

        `tasks` are names, all answered from one upload; the agent's own tasks if there are none. With `tap` (a name),
        `width` (the share of its encoder's channels) or `rate` the photo is encoded at that operating point and sent;
        the router chooses what is left open.

        Where the cloud is configured and does not answer, the best exit does, and the answer is marked degraded. Where
        none is configured, the answer of the exits is not. Tasks without an exit are listed as missing.

        Raises InvalidInput if the photo cannot be read, if a task, tap, width or rate does not exist, or for a deadline
        out of range; AgentClosed after `close`.
        """
        if self._closed:
            raise AgentClosed("the agent was closed before this request")
        request = resolve_request(self.costs.points, self.manifest, self.config, tasks, Overrides(tap, width, rate))
        state = RequestState(request, self._deadline_s(deadline_s))
        with state.stage("decode"):
            image = as_image(photo)
            pixels_CHW = preprocess(image, self.manifest.preprocessing)
        step = self._next(state)
        while step.route == "continue":
            self._run_segment(state, pixels_CHW)
            step = self._next(state)
        answer = self._execute(step, state, image, pixels_CHW)
        if self.metrics:
            self.metrics.answered(answer)
            self.metrics.link(self.link)
        return answer

    def _deadline_s(self, requested_s: float | None) -> float:
        """Of one request. Raises InvalidInput for one that the settings would refuse."""
        if requested_s is None:
            return self.config.deadline_s
        if not MIN_DEADLINE_S <= requested_s <= MAX_DEADLINE_S:
            raise InvalidInput(f"deadline_s is {requested_s}, expected {MIN_DEADLINE_S} to {MAX_DEADLINE_S}")
        return requested_s

    def _connect(self, fingerprint: bytes) -> Link | None:
        config = self.config
        if config.cloud is None or config.mode == "edge":
            return None
        late = self.metrics.late if self.metrics else lambda: None
        labels = tuple(len(task.labels) for task in self.manifest.tasks)
        link = Link(config.cloud, fingerprint, labels, config.tls, config.breaker, late)
        link.wait_probed(config.connect_s)
        return link

    def _next(self, state: RequestState) -> RoutePlan:
        """The next step: fixed by the mode, or else planned by the policy."""
        if (step := self._fixed_by_mode(state)) is not None:
            return step
        passed, situation = len(state.exits), self._situation(state)
        step = plan(situation, self.goal)
        if step.route == "fallback" and not situation.cloud_refused and situation.left_s >= EXPLORE_LEFT_S:
            step = self._explored(step, situation)
        if state.request.no_exit is not None:
            return step
        if passed:
            self.costs.exit_share[passed - 1].observe(step.route == "exit")
        elif step.route in ("offload", "split"):
            self._head_idle += 1
            if self._head_idle >= HEAD_IDLE_AT_MOST:
                return RoutePlan("continue", f"{step.why}; but the head did not run for {self._head_idle} photos")
        return step

    def _explored(self, step: RoutePlan, situation: Situation) -> RoutePlan:
        """`step`, which is to fall back, or now and then the quickest route in spite of its estimate."""
        sendable = [route for route in situation.routes if route.route != "continue"]
        if not sendable or not self._exploration.due(time.monotonic()):
            return step
        best = min(sendable, key=lambda route: route.seconds)
        return RoutePlan(best.route, f"{step.why}; sent all the same, to measure: {describe(best)}", best.point)

    def _fixed_by_mode(self, state: RequestState) -> RoutePlan | None:
        """The next step where the mode leaves no choice, else None."""
        mode, request, passed = self.config.mode, state.request, len(state.exits)
        if request.forced_split:
            return None
        if mode == "offload" and not passed:
            return RoutePlan("offload", "mode offload")
        if mode != "edge":
            return None
        if passed < self._head.exits:
            return RoutePlan("continue", "mode edge")
        return (
            RoutePlan("fallback", f"mode edge; {request.no_exit}")
            if request.no_exit
            else RoutePlan("exit", "mode edge")
        )

    def _situation(self, state: RequestState) -> Situation:
        passed, request = len(state.exits), state.request
        refused = "no cloud is configured" if self.link is None else self.link.unavailable_reason()
        estimate = self.link.estimate if self.link and refused is None else None
        return Situation(
            exit_name=self._exits[passed - 1] if passed else None,
            confidence=float(state.exits[-1].max()) if passed else None,
            routes=self.costs.routes(passed, estimate, request),
            left_s=math.inf if request.forced_split else self._cloud_left_s(state),
            cloud_refused=refused,
            no_exit=request.no_exit,
        )

    def _cloud_left_s(self, state: RequestState) -> float:
        """Seconds that the cloud has: up to the deadline, less what the device needs for its own answer afterwards."""
        own_s = FALLBACK_RESERVE_S if state.exits else FALLBACK_RESERVE_S + self.costs.segment_s[0].value
        return state.left_s - own_s

    def _run_segment(self, state: RequestState, pixels_CHW: Floats) -> None:
        """Run the next segment of the head and its exit."""
        index = len(state.exits)
        self._head_idle = 0
        before_ms = state.stage_ms.get("head", 0.0)
        with state.stage("head"):
            source_CHW = pixels_CHW if state.features is None else state.features
            state.features, probabilities_K = self._head.segment(index, source_CHW)
        state.exits.append(probabilities_K)
        self.costs.segment_s[index].observe((state.stage_ms["head"] - before_ms) / 1000)
        if self.metrics:
            self.metrics.passed(self._exits[index], float(probabilities_K.max()))

    def _execute(self, step: RoutePlan, state: RequestState, image: Image.Image, pixels_CHW: Floats) -> Answer:
        """The answer that the last step leads to; the best exit's if the cloud fails."""
        if step.route == "exit":
            return self._answer_locally(step.why, state, pixels_CHW, None)
        if step.route == "fallback":
            cloud_out = self.link is None or self.link.unavailable_reason() is not None
            return self._answer_locally(step.why, state, pixels_CHW, "cloud_down" if cloud_out else "deadline")
        tasks = tuple(sorted(state.request.tasks))
        try:
            if step.point is None:
                point, payload = None, self._payloads.whole_image(state, image, self.config.whole_image)
            else:
                point, payload = self._payloads.bottleneck(state, step.point, pixels_CHW)
            reply = self._send(payload, tasks, state)
        except IsthmusError as error:
            return self._answer_locally(f"{step.why}; but {error}", state, pixels_CHW, degraded_reason(error))
        answers = dict(zip(tasks, map(np.array, reply.probabilities), strict=True))
        return self._answer("split" if point else "offload", answers, state, step.why, point)

    def _send(self, payload: Payload, tasks: tuple[int, ...], state: RequestState) -> CloudReply:
        """The cloud's reply; its bytes and times go into `state` and the cost model."""
        if self.link is None:
            raise LinkDown("no cloud is configured")
        with state.stage("cloud"):
            exchange = self.link.infer(payload, self._cloud_left_s(state), tasks, state.add_up_bytes)
        self._exploration.replied()
        reply = exchange.reply
        state.down_bytes = exchange.down_bytes
        state.stage_ms["cloud_queue"] = 1000 * reply.queue_s
        state.stage_ms["cloud_compute"] = 1000 * reply.compute_s
        self.costs.record_cloud(payload, min(reply.queue_s + reply.compute_s, exchange.elapsed_s))
        return reply

    def _answer_locally(self, why: str, state: RequestState, pixels_CHW: Floats, degraded: str | None) -> Answer:
        """The answer of the deepest exit that has run; runs the first one if none has."""
        if not state.exits:
            self._run_segment(state, pixels_CHW)
        if self.link is None:
            degraded = None  # the owner chose the device alone
        if degraded and self.metrics:
            self.metrics.degraded(degraded)
        route: AnswerRoute = "fallback" if degraded else "exit"
        return self._answer(route, {0: state.exits[-1]}, state, why)

    def _answer(
        self,
        route: AnswerRoute,
        found: Mapping[int, NDArray[Any]],
        state: RequestState,
        why: str,
        point: OperatingPoint | None = None,
    ) -> Answer:
        """`found`: probabilities of each task that was answered, by its index."""
        state.stage_ms["total"] = 1000 * (time.monotonic() - state.started_s)
        return build_answer(
            state,
            self.manifest.tasks,
            found,
            route=route,
            exit_name=self._exits[len(state.exits) - 1] if route in ("exit", "fallback") else None,
            point=self.costs.points.parts(point) if point else (None, None, None),
            cost_usd=self.config.prices.usd(state.up_bytes, state.cloud_s, state.device_s),
            why=why,
        )


def exit_confidence(thresholds: Sequence[Threshold], epsilon: float) -> float:
    """The threshold certified for the largest epsilon up to the given one; NEVER if there is none."""
    allowed = [threshold for threshold in thresholds if threshold.epsilon <= epsilon + 1e-12]
    return max(allowed, key=lambda threshold: threshold.epsilon).confidence if allowed else NEVER
