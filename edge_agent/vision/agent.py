"""The agent for photos: image -> head -> exit, or codec -> link -> answer, top to bottom.

What computes holds one of the device's slots, granted in order of arrival; waiting for the cloud holds none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent.config import MODES, EdgeConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.ledger import Ledger, default_path
from isthmus.edge_agent.lifetime import Lifetime
from isthmus.edge_agent.policy.audit import Audit
from isthmus.edge_agent.policy.drift import DriftGate
from isthmus.edge_agent.policy.exits import OperatingPoint, RoutePlan
from isthmus.edge_agent.radio import Radio, probe_charge
from isthmus.edge_agent.slots import FairSlots, compute_slots
from isthmus.edge_agent.vision.audit import DEADLINE_S, Auditor, Device, audited_levels
from isthmus.edge_agent.vision.audited_pairs import AuditedPairs, pairs_path
from isthmus.edge_agent.vision.batch import in_order
from isthmus.edge_agent.vision.charges import Charges
from isthmus.edge_agent.vision.costs import Costs, Reply
from isthmus.edge_agent.vision.exit_rule import VOID, certified, exit_rule, exit_shares
from isthmus.edge_agent.vision.image_input import Photo, as_image
from isthmus.edge_agent.vision.live import Dropped, LiveWork, WhenFull
from isthmus.edge_agent.vision.metrics import EdgeMetrics, degraded_reason
from isthmus.edge_agent.vision.payloads import PayloadEncoder, image_payload
from isthmus.edge_agent.vision.replicas import connect
from isthmus.edge_agent.vision.request import (
    Floats,
    InferenceRequest,
    Overrides,
    RequestState,
    image_of,
    images_of,
    resolve_deadline,
    resolve_request,
)
from isthmus.edge_agent.vision.result import Answer, AnswerRoute, build_answer
from isthmus.edge_agent.vision.router import Router, goal_of
from isthmus.edge_agent.vision.task_answers import task_answer
from isthmus.edge_agent.vision.warm_up import warm_up
from isthmus.models.errors import InvalidInput, IsthmusError, LinkDown, ServiceError
from isthmus.models.messages import CloudReply, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import void_because
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import geometry, preprocess
from isthmus.models.vision.manifest import Head as Described
from isthmus.models.vision.outputs import bounds_of, finish

log = logging.getLogger("isthmus.edge")

Found = NDArray[Any] | Sequence[NDArray[Any]]  # of one task: probabilities, or the tensors of another kind
LOSSLESS = 100  # quality of a PNG
BACK_PRESSURE = "more photos came than the cloud answers in time"
MAX_THREADS = 32  # of `ainfer` and `infer_many` together; most of them wait for the device or the cloud
BATCH_SENT = 16  # photos of a batch under way beside those that are computed: they wait for the cloud meanwhile


class EdgeAgent:
    """One device's agent for one vision bundle. Close it, or use it in `with`.

    Safe to call from several threads, in the process that made it: after a fork it raises AgentClosed, and the child
    makes an agent of its own. Photos beyond what the device computes at once wait for their turn within their deadline.
    """

    def __init__(self, config: EdgeConfig, metrics: EdgeMetrics | None = None) -> None:
        """Open and verify the bundle, warm up the head, and wait up to `connect_s` for the cloud.

        Raises BundleError, or InvalidInput for settings that contradict each other or the bundle.
        """
        if not isinstance(config, EdgeConfig):
            raise InvalidInput(f"config is {type(config).__name__}, expected an EdgeConfig")
        if config.mode not in MODES or (config.mode in ("split", "offload") and not config.clouds):
            raise InvalidInput(f"mode {config.mode!r} is unknown or needs a cloud, expected one of {', '.join(MODES)}")
        bundle = Bundle.open(config.bundle)
        if config.require_signature is not None:
            from isthmus.models.bundle.signature import check_signature  # cryptography takes 80 ms to import

            check_signature(config.bundle, config.require_signature, bundle.manifest.fingerprint)
        self.config = config
        self.manifest = bundle.manifest
        self.metrics = metrics
        self.profile = open_profile(config.profile, config.prices)
        self.costs = Costs(bundle.manifest, self.profile, config.precision)
        self.ledger = Ledger(config.budgets.budgets, config.ledger or default_path())
        self._radio = Radio()
        resolve_request(self.costs.points, self.manifest, config, None, Overrides())  # unknown tasks are refused now
        self.costs.send_whole_as(image_of(self.costs.points, config), images_of(self.costs.points, config))
        self._codecs = [bundle.codec(tap) for tap in range(len(bundle.manifest.taps))]
        self._head = Head(bundle, config.threads, config.precision)
        self._payloads = PayloadEncoder(self._head, self._codecs, self.costs, self.manifest.preprocessing, metrics)
        described = bundle.manifest.heads[config.precision]
        self._exits = [exit_.name for exit_ in described.exits]
        self.exit_rule = exit_rule(described, config.epsilon, config.promise, config.among)
        self.certificates_void = void_because(self.manifest, config.precision)
        if self.certificates_void:
            log.warning("%s", VOID.format(self.certificates_void))
        if metrics:
            metrics.certificates(bool(self.certificates_void))
        self.goal = goal_of(config, min(self.exit_rule.confidences))
        best = certified(described, config.epsilon, config.promise, config.among)
        self.costs.expect_exits(exit_shares(described, best))
        self._router = Router(self.costs, self._exits, self.ledger, self._radio)
        self._slots = FairSlots(compute_slots(config.threads))
        self._batch = compute_slots(config.threads) + BATCH_SENT
        self._threads = ThreadPoolExecutor(MAX_THREADS, "isthmus-photo")
        self._lifetime = Lifetime()
        blank_CHW = np.zeros((3, *self.manifest.preprocessing.crop), np.float32)
        warm_up(self._head, self._codecs, self.costs, blank_CHW)
        late = metrics.late if metrics else lambda: None
        spend = probe_charge(self.ledger, self.profile, self._radio)
        self.replicas = connect(config, self.manifest, bundle.fingerprint, late, spend)
        self._answering = 0  # photos; a race between threads may miscount, and an audit then waits its patience out
        self._auditor = self._open_audit(described)

    def __enter__(self) -> EdgeAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the clouds. Later requests raise AgentClosed."""
        inherited, self._lifetime.closed = self._lifetime.inherited, True
        if not inherited:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self.replicas.close()
        if not inherited:
            if self._auditor:
                self._auditor.close()
            self.ledger.close()

    def _open_audit(self, described: Described) -> Auditor | None:
        """The audit of the exits' promise; None where no exit may answer, or nothing may be sent."""
        config, audits = self.config, self.config.audits
        epsilon, levels = audited_levels(described, config.epsilon, config.promise, config.among)
        audited = config.mode == "auto" and config.clouds and audits.share
        classifies = self.manifest.tasks[0].kind == "classify" and all(exit_.answers for exit_ in described.exits)
        if self.certificates_void or not levels or not audited or not classifies:
            return None
        file = pairs_path(audits.folder, self.manifest.name, self.manifest.fingerprint, config.precision)
        device = Device(self._head, self._slots, lambda: self._answering > 0, self._ask_cloud, self._use_thresholds)
        return Auditor(
            Audit(epsilon, levels, audits.share, audits.seed, strict=audits.drift == "stop"),
            AuditedPairs.kept_in(file),
            self.exit_rule,
            device,
            self.metrics.audit if self.metrics else None,
            audits.recalibrate == "auto",
            None if audits.drift == "off" else DriftGate(audits.seed),
        )

    def _ask_cloud(self, image: Image.Image) -> int:
        """The index of the cloud model's answer to a photo as it is. Raises IsthmusError."""
        self._lifetime.check()
        link = self.replicas.best()
        if link is None or not link.ready:
            raise LinkDown("no cloud has room for a photo that nobody waits for")
        state = RequestState(InferenceRequest((0,), (), True, "audited"), DEADLINE_S)
        payload = image_payload(image, self.manifest.preprocessing, "png", LOSSLESS)
        reply = self._exchange(payload, (0,), state)
        if self.metrics:
            self.metrics.audited(state.up_bytes, state.down_bytes)
        return int(np.argmax(reply.probabilities[0]))

    def _use_thresholds(self, confidences: Sequence[float]) -> None:
        self.exit_rule = replace(self.exit_rule, confidences=tuple(confidences))

    def infer(
        self,
        photo: Photo,
        deadline_s: float | None = None,
        *,
        tasks: Sequence[str] | None = None,
        tap: str | None = None,
        width: float | None = None,
        rate: int | None = None,
        private: bool = False,
        explain: bool = False,
    ) -> Answer:
        """Answer one photo: a JPEG, PNG or WebP file (path, bytes or file object), a PIL image, or an array of pixels.

        `tasks` are names, all answered from one upload; the agent's own tasks if there are none. With `tap` (a name),
        `width` (the share of its encoder's channels) or `rate` the photo is encoded at that operating point and sent;
        the router chooses what is left open. A `private` photo is answered by the exits: nothing of it leaves the
        device. With `explain` the answer holds every way that was considered.

        Where the cloud is configured and does not answer, the best exit does, and the answer is marked degraded. Where
        none is configured, the answer of the exits is not. Tasks without an exit are listed as missing.

        Raises InvalidInput if the photo cannot be read, if a task, tap, width or rate does not exist, or for a deadline
        out of range; AgentClosed after `close`.
        """
        return self._answer_photo(photo, self._begin(deadline_s, tasks, Overrides(tap, width, rate, private), explain))

    async def ainfer(
        self,
        photo: Photo,
        deadline_s: float | None = None,
        *,
        tasks: Sequence[str] | None = None,
        tap: str | None = None,
        width: float | None = None,
        rate: int | None = None,
        private: bool = False,
        explain: bool = False,
    ) -> Answer:
        """As `infer`, for asyncio: the event loop goes on meanwhile.

        A task that is cancelled ends at once; its photo is computed no further, and nothing more is sent for it.
        """
        state = self._begin(deadline_s, tasks, Overrides(tap, width, rate, private), explain)
        work = partial(self._answer_photo, photo, state)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except asyncio.CancelledError:
            state.cancelled = True
            if (task := asyncio.current_task()) is None or not task.cancelling():
                self._lifetime.check()  # `close` has ended the photo, and nobody the task
            raise

    def infer_many(
        self,
        photos: Iterable[Photo],
        deadline_s: float | None = None,
        *,
        tasks: Sequence[str] | None = None,
        tap: str | None = None,
        width: float | None = None,
        rate: int | None = None,
        private: bool = False,
        explain: bool = False,
        when_full: WhenFull = "block",
    ) -> Iterator[Answer | Dropped]:
        """Answers in the order of `photos`, of which several are computed or sent at once, each within its deadline.

        `block` takes photos from the iterable as they are needed. The other values of `when_full` are for a live
        source, which is read as fast as it gives: where more comes than is answered, `drop_oldest` and `drop_newest`
        leave out photos that wait, and a Dropped stands in their place; `degrade` answers on the device alone, marked
        degraded.

        Other arguments and errors are those of `infer`; an error ends the iteration, with a note that names the photo
        by its index.
        """
        if isinstance(photos, str | bytes) or not isinstance(photos, Iterable):
            raise InvalidInput(f"photos is {type(photos).__name__}, expected a list or another iterable of photos")
        begin = partial(self._begin, deadline_s, tasks, Overrides(tap, width, rate, private), explain)
        begin()  # what is wrong for every photo is raised at once
        if when_full == "block":
            return self._lifetime.until_closed(
                in_order(self._threads, lambda photo: self._answer_photo(photo, begin()), photos, self._batch)
            )
        if when_full not in get_args(WhenFull):
            raise InvalidInput(f"when_full is {when_full!r:.32}, expected one of {', '.join(get_args(WhenFull))}")
        dropped = partial(self.metrics.dropped, when_full) if self.metrics else lambda: None

        def work(photo: Photo, degraded: bool) -> Answer:
            state = begin()
            state.device_only = BACK_PRESSURE if degraded else None
            return self._answer_photo(photo, state)

        live = LiveWork(self._threads, work, photos, self._batch, when_full, dropped)
        return self._lifetime.until_closed(live.results())

    def _begin(
        self, deadline_s: float | None, tasks: Sequence[str] | None, overrides: Overrides, explain: bool
    ) -> RequestState:
        """A request, whose deadline counts from now. Raises AgentClosed, InvalidInput."""
        self._lifetime.check()
        request = resolve_request(self.costs.points, self.manifest, self.config, tasks, overrides)
        if self.certificates_void and self.config.mode != "edge" and request.no_exit is None:
            request = replace(request, no_exit=VOID.format(self.certificates_void))
        return RequestState(request, resolve_deadline(self.config, deadline_s), explain)

    def _answer_photo(self, photo: Photo, state: RequestState) -> Answer:
        """Compute on the device, then send if the route says so. Raises InvalidInput, CancelledError."""
        self._answering += 1
        try:
            answer, image, pixels_CHW = self._answer_image(photo, state)
        finally:
            self._answering -= 1
        if self._auditor:
            self._auditor.answered(state, answer, image, pixels_CHW)
        return answer

    def _answer_image(self, photo: Photo, state: RequestState) -> tuple[Answer, Image.Image, Floats]:
        """The answer, and the photo that was decoded for it."""
        with self._computing(state):
            with state.stage("decode"):
                image = as_image(photo)
                state.geometry = geometry(image, self.manifest.preprocessing)
                pixels_CHW = preprocess(image, self.manifest.preprocessing)
            step = self._next(state)
            while step.route == "continue":
                state.raise_if_cancelled()
                self._run_segment(state, pixels_CHW)
                step = self._next(state)
            done = self._compute_step(step, state, image, pixels_CHW)
        answer = self._send(done, step, state, pixels_CHW) if isinstance(done, tuple) else done
        if self.metrics:
            self.metrics.answered(answer)
            self.metrics.replicas(self.replicas)
        return answer, image, pixels_CHW

    @contextmanager
    def _computing(self, state: RequestState, urgent: bool = False) -> Iterator[None]:
        """One of the device's slots, in order of arrival; `urgent` for a photo that had one before."""
        if not self._slots.acquire(0):
            with state.stage("wait"):
                self._slots.acquire(urgent=urgent)
        try:
            state.raise_if_cancelled()
            yield
        finally:
            self._slots.release()

    def _next(self, state: RequestState) -> RoutePlan:
        link = self.replicas.best()
        if state.device_only:
            return self._router.next(state, self.config.mode, self.goal, None, state.device_only)
        if link:
            link.planned()
        estimate, refused = (link.estimate, None) if link else (None, self.replicas.unavailable_reason())
        goal = replace(self.goal, exit_confidence=self.exit_rule.confidence(len(state.exits)))
        return self._router.next(state, self.config.mode, goal, estimate, refused)

    def _run_segment(self, state: RequestState, pixels_CHW: Floats) -> None:
        """Run the next segment of the head and its exit."""
        index = len(state.exits)
        self._router.head_ran()
        before_ms = state.stage_ms.get("head", 0.0)
        with state.stage("head"):
            source_CHW = pixels_CHW if state.features is None else state.features
            state.features, output = self._head.segment(index, source_CHW)
        if index == 0:
            state.first_features = state.features
        state.exits.append(output)
        state.score = self.exit_rule.score(state.exits)
        self.costs.segment_s[index].observe((state.stage_ms["head"] - before_ms) / 1000, time.monotonic())
        if self.metrics:
            self.metrics.passed(self._exits[index], state.score)

    def _compute_step(
        self, step: RoutePlan, state: RequestState, image: Image.Image, pixels_CHW: Floats
    ) -> Answer | tuple[OperatingPoint | None, Payload]:
        """The device's own answer, or the payload to send; of which operating point, None for a whole image."""
        if step.route == "exit":
            return self._answer_locally(step.why, state, pixels_CHW, None)
        if step.route == "fallback":
            reason = "deadline" if self.replicas.best() else "cloud_down"
            lacking = step.lacking or ("back_pressure" if state.device_only else reason)
            return self._answer_locally(step.why, state, pixels_CHW, lacking)
        try:
            if step.point is None:
                planned = None if self.config.mode == "offload" else state.image
                way = planned or image_of(self.costs.points, self.config)
                return None, self._payloads.whole_image(state, image, way)
            return self._payloads.bottleneck(state, step.point, pixels_CHW)
        except IsthmusError as error:
            return self._answer_locally(f"{step.why}; but {error}", state, pixels_CHW, degraded_reason(error))

    def _send(
        self, encoded: tuple[OperatingPoint | None, Payload], step: RoutePlan, state: RequestState, pixels_CHW: Floats
    ) -> Answer:
        """A cloud's answer; the best exit's if the clouds fail or are late."""
        point, payload = encoded
        tasks = tuple(sorted(state.request.tasks))
        state.raise_if_cancelled()
        try:
            reply = self._exchange(payload, tasks, state)
        except IsthmusError as error:
            why = "; but ".join((step.why, *state.detours, str(error)))
            with self._computing(state, urgent=True) if not state.exits else nullcontext():
                return self._answer_locally(why, state, pixels_CHW, degraded_reason(error))
        self._router.replied()
        answers = self._read_reply(tasks, reply)
        why = "; but ".join((step.why, *state.detours))
        return self._answer("split" if point else "offload", answers, state, why, point)

    def _exchange(self, payload: Payload, tasks: tuple[int, ...], state: RequestState) -> CloudReply:
        """A cloud's reply; its bytes and times go into `state`, the cost model and the ledger."""
        left_s, cloud_s = partial(self._router.cloud_left_s, state), self.costs.cloud_s(payload.codec, payload.tap)
        charges = Charges(self.ledger, self.costs, self._radio, left_s)
        state.charge = charges.before_sending
        try:
            with state.stage("cloud"):
                exchange = self.replicas.infer(payload, tasks, state, left_s, cloud_s)
            reply = exchange.reply
            charges.answered(Reply(exchange.down_bytes, reply.compute_s, exchange.elapsed_s))
        finally:
            charges.close()
            state.joules = charges.spent.joules
        state.add_reply(reply, exchange.down_bytes)
        self.costs.record_cloud(payload, min(reply.compute_s, exchange.elapsed_s))
        return reply

    def _answer_locally(self, why: str, state: RequestState, pixels_CHW: Floats, degraded: str | None) -> Answer:
        """The answer of the deepest exit that has run; runs the first one if none has."""
        if not state.exits:
            self._run_segment(state, pixels_CHW)
        if not self.replicas or state.request.private:
            degraded = None  # the owner chose the device alone
        if degraded and self.metrics:
            self.metrics.degraded(degraded)
        route: AnswerRoute = "fallback" if degraded else "exit"
        return self._answer(route, self._read_exit(state), state, why)

    def _read_reply(self, tasks: Sequence[int], reply: CloudReply) -> dict[int, Found]:
        """What a cloud found of each task: probabilities, or its tensors."""
        numbers, tensors = iter(reply.probabilities), iter(reply.outputs)
        found: dict[int, Found] = {}
        for task in tasks:
            bounds = bounds_of(self.manifest.tasks[task], self.manifest.preprocessing.crop)
            if isinstance(bounds, int):
                found[task] = np.array(next(numbers))
            else:
                found[task] = [next(tensors).array for _ in bounds.tensors]
        return found

    def _read_exit(self, state: RequestState) -> dict[int, Found]:
        """What the deepest exit that has run found of the first task; nothing where there is none."""
        outputs = [each for each in state.exits if each is not None]
        if not outputs:
            return {}
        if isinstance(outputs[-1], np.ndarray):
            return {0: outputs[-1]}
        try:
            return {0: finish(self.manifest.tasks[0], outputs[-1], self.manifest.preprocessing.crop)}
        except ValueError as error:
            raise ServiceError(f"the exit gave {error}") from error

    def _answer(
        self,
        route: AnswerRoute,
        found: Mapping[int, Found],
        state: RequestState,
        why: str,
        point: OperatingPoint | None = None,
    ) -> Answer:
        """`found`: of each task that was answered, by its index."""
        tasks, size, back = self.manifest.tasks, self.manifest.preprocessing.crop, state.geometry
        assert back is not None  # the photo was decoded
        answers = {task: task_answer(tasks[task], each, size, back) for task, each in found.items()}
        state.stage_ms["total"] = 1000 * (time.monotonic() - state.started_s)
        return build_answer(
            state,
            tasks,
            answers,
            route=route,
            exit_name=self._exits[len(state.exits) - 1] if route in ("exit", "fallback") else None,
            point=self.costs.points.parts(point) if point else (None, None, None),
            cost_usd=self.profile.prices.usd(state.up_bytes, state.cloud_s, state.device_s, state.down_bytes),
            modelled_joules=self.costs.own(state.device_s).joules + state.joules,
            why=why,
        )
