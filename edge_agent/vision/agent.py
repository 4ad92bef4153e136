"""A photo's day on the device: image -> head -> exit or codec -> link -> answer, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent.config import MODES, EdgeConfig
from isthmus.edge_agent.policy.exits import Goal, OperatingPoint, RoutePlan, Situation, plan
from isthmus.edge_agent.transport.link import Link, Reply
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.image_input import Photo, as_image
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.edge_agent.vision.request import Overrides, task_indices, wanted
from isthmus.edge_agent.vision.request_state import RequestState
from isthmus.edge_agent.vision.result import Answer, AnswerRoute, TaskAnswer
from isthmus.edge_agent.vision.warm_up import warm_up
from isthmus.models.errors import DeadlineExceeded, InvalidInput, IsthmusError, LinkDown, PayloadTooLarge
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_image, is_grey, preprocess, shrink
from isthmus.models.vision.manifest import Task, Threshold
from isthmus.protos.limits import MAX_IMAGE_BYTES

Floats = NDArray[np.float32]

FALLBACK_RESERVE_S = 0.02  # kept back from the deadline for the device's own work after a late cloud
NEVER = 2.0
HEAD_IDLE_AT_MOST = 20  # a wrong estimate of the head must not keep it from being run and measured for ever


class EdgeAgent:
    """One device's agent for one vision bundle. Safe to call from several threads; close it, or use it in `with`."""

    def __init__(self, config: EdgeConfig, metrics: EdgeMetrics | None = None) -> None:
        """Opens and verifies the bundle, warms the head up, and waits up to `connect_s` for the cloud.

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
        described = bundle.manifest.heads[config.precision]
        self._exits = [exit_.name for exit_ in described.exits]
        self.goal = Goal(config.objective, exit_confidence(described.thresholds, config.epsilon))
        self._head_idle = 0  # photos since the head was last run
        blank_CHW = np.zeros((3, *self.manifest.preprocessing.crop), np.float32)
        warm_up(self._head, self._codecs, self.costs, blank_CHW)
        self.link: Link | None = None
        if config.cloud is not None and config.mode != "edge":
            late = metrics.late if metrics else lambda: None
            labels = tuple(len(task.labels) for task in bundle.manifest.tasks)
            self.link = Link(config.cloud, bundle.fingerprint, labels, config.tls, config.breaker, late)
            self.link.wait_probed(config.connect_s)

    def __enter__(self) -> EdgeAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cloud."""
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
        """Answer one photo: a PIL image, the bytes of a JPEG, PNG or WebP file, or a path to one.

        `tasks` by name, all from one upload; the agent's own when none is named. With `tap` (its name), `width` (the
        share of its encoder's channels) or `rate` the photo is encoded so and sent; what is left open the router picks.

        Never fails for want of a cloud: the best exit answers then, marked degraded, and what no exit knows is listed
        as missing. Raises InvalidInput when the photo cannot be read, or there is no such task, tap, width or rate.
        """
        wish = wanted(self.costs.points, self.manifest, self.config, tasks, Overrides(tap, width, rate))
        visit = RequestState(wish, deadline_s or self.config.deadline_s)
        with visit.stage("decode"):
            image = as_image(photo)
            pixels_CHW = preprocess(image, self.manifest.preprocessing)
        step = self._next(visit)
        while step.route == "continue":
            self._run_segment(visit, pixels_CHW)
            step = self._next(visit)
        answer = self._carry_out(step, visit, image, pixels_CHW)
        if self.metrics:
            self.metrics.answered(answer)
            self.metrics.link(self.link)
        return answer

    def _next(self, visit: RequestState) -> RoutePlan:
        """Ask the policy; a mode other than auto has its mind made up."""
        passed, mode, wish = len(visit.exits), self.config.mode, visit.wanted
        last = passed == self._head.exits
        if mode == "offload" and not wish.pinned and not passed:
            return RoutePlan("offload", "mode offload")
        if mode == "edge" and not wish.pinned:
            if not last:
                return RoutePlan("continue", "mode edge")
            return (
                RoutePlan("fallback", f"mode edge; {wish.no_exit}") if wish.no_exit else RoutePlan("exit", "mode edge")
            )
        refused = "no cloud is configured" if self.link is None else self.link.usable()
        estimate = self.link.estimate if self.link and refused is None else None
        situation = Situation(
            exit_name=self._exits[passed - 1] if passed else None,
            confidence=float(visit.exits[-1].max()) if passed else None,
            options=self.costs.options(passed, estimate, wish),
            left_s=math.inf if wish.pinned else self._cloud_left_s(visit),
            cloud_refused=refused,
            no_exit=wish.no_exit,
        )
        step = plan(situation, self.goal)
        if not passed and wish.no_exit is None and step.route in ("offload", "split"):
            self._head_idle += 1
            if self._head_idle >= HEAD_IDLE_AT_MOST:
                step = RoutePlan("continue", f"{step.why}; but the head was not measured for {self._head_idle} photos")
        if passed and wish.no_exit is None:
            self.costs.exit_share[passed - 1].observe(step.route == "exit")
        return step

    def _cloud_left_s(self, visit: RequestState) -> float:
        """Seconds that the cloud may take: less what the device needs to answer by itself afterwards."""
        own_s = FALLBACK_RESERVE_S if visit.exits else FALLBACK_RESERVE_S + self.costs.segment_s[0].value
        return visit.left_s - own_s

    def _run_segment(self, visit: RequestState, pixels_CHW: Floats) -> None:
        index = len(visit.exits)
        self._head_idle = 0
        before_ms = visit.stage_ms.get("head", 0.0)
        with visit.stage("head"):
            source = pixels_CHW if visit.features is None else visit.features
            visit.features, probabilities_K = self._head.segment(index, source)
        visit.exits.append(probabilities_K)
        self.costs.segment_s[index].observe((visit.stage_ms["head"] - before_ms) / 1000)
        if self.metrics:
            self.metrics.passed(self._exits[index], float(probabilities_K.max()))

    def _carry_out(self, step: RoutePlan, visit: RequestState, image: Image.Image, pixels_CHW: Floats) -> Answer:
        if step.route == "exit":
            return self._answer_here(step, visit, pixels_CHW, None)
        if step.route == "fallback":
            cloud_out = self.link is None or self.link.usable() is not None
            return self._answer_here(step, visit, pixels_CHW, "cloud_down" if cloud_out else "deadline")
        tasks = tuple(sorted(visit.wanted.tasks))
        try:
            if step.point is None:
                point, payload = None, self._pack_image(visit, image)
            else:
                point, payload = self._encode(visit, step.point, pixels_CHW)
            reply = self._ask(payload, tasks, visit)
        except IsthmusError as error:
            failed = RoutePlan("fallback", f"{step.why}; but {error}")
            return self._answer_here(failed, visit, pixels_CHW, degraded_reason(error))
        answers = dict(zip(tasks, map(np.array, reply.answer.probabilities), strict=True))
        return self._answer("split" if point else "offload", answers, visit, step.why, point)

    def _encode(
        self, visit: RequestState, planned: OperatingPoint, pixels_CHW: Floats
    ) -> tuple[OperatingPoint, Payload]:
        """Bottleneck bytes at the planned point, or at the next cheaper rate that keeps the cap.

        Raises PayloadTooLarge when none does; the caller then answers here.
        """
        tap = planned.tap
        source = visit.features if self.costs.points.after(planned) else pixels_CHW
        assert source is not None  # a tap behind a segment is planned when that has run
        with visit.stage("encode"):
            latent_CHW = self._head.encode(tap, source, planned.width)
            rate, data = self._codecs[tap].compress(latent_CHW, planned.rate)
        point = replace(planned, rate=rate)
        self.costs.encode_s[tap][point.width].observe(visit.stage_ms["encode"] / 1000)
        self.costs.point_bytes[point].observe(len(data))
        if self.metrics:
            self.metrics.encoded(len(data), *self.costs.points.parts(point))
        return point, Payload(Codec.BOTTLENECK, tap, rate, data)

    def _pack_image(self, visit: RequestState, image: Image.Image) -> Payload:
        """The whole photo as the cloud needs it: no larger than the network's input, grey when it is grey."""
        whole = self.config.whole_image
        with visit.stage("encode"):
            small = shrink(image, self.manifest.preprocessing.resize)
            data = encode_image(small.convert("L") if is_grey(small) else small, whole.form, whole.quality)
        if len(data) > MAX_IMAGE_BYTES:
            raise PayloadTooLarge(f"the photo has {len(data)} bytes as {whole.form}, the cap is {MAX_IMAGE_BYTES}")
        self.costs.image_encode_s.observe(visit.stage_ms["encode"] / 1000)
        self.costs.image_bytes.observe(len(data))
        return Payload(Codec.IMAGE, 0, 0, data)

    def _ask(self, payload: Payload, tasks: tuple[int, ...], visit: RequestState) -> Reply:
        if self.link is None:
            raise LinkDown("no cloud is configured")
        with visit.stage("cloud"):
            reply = self.link.ask(payload, self._cloud_left_s(visit), tasks)
        visit.up_bytes, visit.down_bytes = reply.up_bytes, reply.down_bytes
        visit.stage_ms["cloud_queue"] = 1000 * reply.answer.queue_s
        visit.stage_ms["cloud_compute"] = 1000 * reply.answer.compute_s
        image = payload.codec is Codec.IMAGE
        macs = self.costs.whole_macs if image else self.costs.tail_macs[payload.tap]
        self.costs.cloud_s_per_mac.observe((reply.answer.queue_s + reply.answer.compute_s) / max(macs, 1))
        return reply

    def _answer_here(self, step: RoutePlan, visit: RequestState, pixels_CHW: Floats, degraded: str | None) -> Answer:
        """The deepest exit passed; the first one is run when none was."""
        if not visit.exits:
            self._run_segment(visit, pixels_CHW)
        if degraded and self.metrics:
            self.metrics.degraded(degraded)
        route: AnswerRoute = "fallback" if degraded else "exit"
        return self._answer(route, {0: visit.exits[-1]}, visit, step.why)

    def _answer(
        self,
        route: AnswerRoute,
        found: Mapping[int, NDArray[Any]],
        visit: RequestState,
        why: str,
        point: OperatingPoint | None = None,
    ) -> Answer:
        """`found`: probabilities of each task that was answered, by its index."""
        asked, tasks = visit.wanted.tasks, self.manifest.tasks
        order = [task for task in asked if task in found] or [0]  # of exits there is nothing but the first task
        answers = {tasks[task].name: task_answer(tasks[task], found[task]) for task in order}
        first = answers[tasks[order[0]].name]
        local = route in ("exit", "fallback")
        visit.stage_ms["total"] = 1000 * (time.monotonic() - visit.started_s)
        cloud_s = visit.stage_ms.get("cloud_compute", 0.0) / 1000
        device_s = sum(visit.stage_ms.get(name, 0.0) for name in ("decode", "head", "encode")) / 1000
        tap, width, rate = self.costs.points.parts(point) if point else (None, None, None)
        return Answer(
            label=first.label,
            index=first.index,
            probabilities=first.probabilities,
            answers=answers,
            missing=tuple(tasks[task].name for task in asked if task not in found),
            route=route,
            exit=self._exits[len(visit.exits) - 1] if local else None,
            tap=tap,
            width=width,
            rate=rate,
            bytes_up=visit.up_bytes,
            bytes_down=visit.down_bytes,
            stage_ms={name: round(value, 3) for name, value in visit.stage_ms.items()},
            degraded=route == "fallback",
            cost_usd=self.config.prices.usd(visit.up_bytes, cloud_s, device_s),
            why=why,
        )


def task_answer(task: Task, probabilities_K: NDArray[Any]) -> TaskAnswer:
    """What probabilities say in the task's words."""
    index = int(probabilities_K.argmax())
    return TaskAnswer(task.labels[index], index, tuple(float(p) for p in probabilities_K))


def exit_confidence(thresholds: Sequence[Threshold], epsilon: float) -> float:
    """The certified threshold of the largest epsilon that is no larger than asked; never exit when there is none."""
    allowed = [threshold for threshold in thresholds if threshold.epsilon <= epsilon + 1e-12]
    return max(allowed, key=lambda threshold: threshold.epsilon).confidence if allowed else NEVER


def degraded_reason(error: IsthmusError) -> str:
    """Label of isthmus_edge_degraded_responses_total."""
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, PayloadTooLarge):
        return "too_large"
    return "cloud_down" if isinstance(error, LinkDown) else "rejected"
