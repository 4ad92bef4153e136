"""A photo's day on the device: image -> head -> exit or codec -> link -> answer, top to bottom."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_agent.answer import Answer, AnswerRoute
from edge_agent.config import MODES, EdgeConfig
from edge_agent.costs import Costs
from edge_agent.link import Link, Reply
from edge_agent.metrics import EdgeMetrics
from edge_agent.policy.plan import Goal, Plan, Situation, plan
from edge_agent.visit import Visit
from models.bundle import Bundle
from models.errors import DeadlineExceeded, InvalidInput, IsthmusError, LinkDown, PayloadTooLarge
from models.manifest import Manifest
from models.types import Codec, Payload
from models.vision.head import Head
from models.vision.images import encode_image, is_grey, open_image, preprocess, shrink
from protos.limits import MAX_IMAGE_BYTES

Floats = NDArray[np.float32]
Photo = Image.Image | bytes | str | os.PathLike[str]

FALLBACK_RESERVE_S = 0.02  # kept back from the deadline for the device's own work after a late cloud
NEVER = 2.0
HEAD_IDLE_AT_MOST = 20  # a wrong estimate of the head must not keep it from being run and measured for ever
MAX_FILE_BYTES = 64 << 20  # a camera's own file; what it decodes to is bounded apart


class EdgeAgent:
    """One device's agent for one vision bundle. Safe to call from several threads; close it, or use it in `with`."""

    def __init__(self, config: EdgeConfig, metrics: EdgeMetrics | None = None) -> None:
        """Opens and verifies the bundle, warms the head up, and waits up to `connect_s` for the cloud.

        Raises BundleError, or InvalidInput for settings that contradict each other.
        """
        if config.mode not in MODES or (config.mode in ("split", "offload") and config.cloud is None):
            raise InvalidInput(f"mode {config.mode!r} is unknown or needs a cloud, expected one of {', '.join(MODES)}")
        bundle = Bundle.open(config.bundle)
        self.config = config
        self.manifest = bundle.manifest
        self.metrics = metrics
        self.costs = Costs(bundle.manifest, config)
        self.goal = Goal(config.objective, exit_confidence(bundle.manifest, config.epsilon))
        self._codec = bundle.codec()
        self._head = Head(bundle, config.threads)
        self._head_idle = 0  # photos since the head was last run
        self._warm_up()
        self.link: Link | None = None
        if config.cloud is not None and config.mode != "edge":
            late = metrics.late if metrics else lambda: None
            labels = len(bundle.manifest.labels)
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

    def infer(self, photo: Photo, deadline_s: float | None = None) -> Answer:
        """Answer one photo: a PIL image, the bytes of a JPEG, PNG or WebP file, or a path to one.

        Never fails for want of a cloud: the best exit answers then, marked degraded. Raises InvalidInput when the
        photo cannot be read.
        """
        visit = Visit(deadline_s or self.config.deadline_s)
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

    def _next(self, visit: Visit) -> Plan:
        """Ask the policy; a mode other than auto has its mind made up."""
        passed, mode = len(visit.exits), self.config.mode
        last = passed == self._head.exits
        if mode == "offload" and not passed:
            return Plan("offload", "mode offload")
        if mode != "auto":
            if not last:
                return Plan("continue", f"mode {mode}")
            return Plan("exit", "mode edge") if mode == "edge" else Plan("split", "mode split", self.costs.rates[-1])
        refused = "no cloud is configured" if self.link is None else self.link.usable()
        estimate = self.link.estimate if self.link and refused is None else None
        confidence = float(visit.exits[-1].max()) if passed else None
        situation = Situation(
            exit_name=self.manifest.exits[passed - 1].name if passed else None,
            confidence=confidence,
            last=last,
            options=self.costs.options(passed, estimate),
            left_s=visit.left_s - FALLBACK_RESERVE_S,
            cloud_refused=refused,
        )
        step = plan(situation, self.goal)
        if step.route == "offload" and not passed:
            self._head_idle += 1
            if self._head_idle >= HEAD_IDLE_AT_MOST:
                step = Plan("continue", f"{step.why}; but the head was not measured for {self._head_idle} photos")
        if passed:
            self.costs.exit_share[passed - 1].observe(step.route == "exit")
        return step

    def _run_segment(self, visit: Visit, pixels_CHW: Floats) -> None:
        index = len(visit.exits)
        self._head_idle = 0
        before_ms = visit.stage_ms.get("head", 0.0)
        with visit.stage("head"):
            source = pixels_CHW if visit.features is None else visit.features
            visit.features, probabilities_K = self._head.segment(index, source)
        visit.exits.append(probabilities_K)
        self.costs.segment_s[index].observe((visit.stage_ms["head"] - before_ms) / 1000)
        if self.metrics:
            self.metrics.passed(self.manifest.exits[index].name, float(probabilities_K.max()))

    def _carry_out(self, step: Plan, visit: Visit, image: Image.Image, pixels_CHW: Floats) -> Answer:
        if step.route == "exit":
            return self._answer_here(step, visit, pixels_CHW, None)
        if step.route == "fallback":
            cloud_out = self.link is None or self.link.usable() is not None
            return self._answer_here(step, visit, pixels_CHW, "cloud_down" if cloud_out else "deadline")
        try:
            payload = self._pack_image(visit, image) if step.route == "offload" else self._encode(visit, step)
            reply = self._ask(payload, visit)
        except IsthmusError as error:
            failed = Plan("fallback", f"{step.why}; but {error}")
            return self._answer_here(failed, visit, pixels_CHW, degraded_reason(error))
        return self._answer(
            "offload" if payload.codec is Codec.IMAGE else "split",
            np.array(reply.answer.probabilities),
            visit,
            why=step.why,
            rate=payload.rate if payload.codec is Codec.FACTORIZED else None,
        )

    def _encode(self, visit: Visit, step: Plan) -> Payload:
        """Bottleneck bytes at the planned rate, or the next cheaper one that keeps the cap.

        Raises PayloadTooLarge when none does; the caller then answers here.
        """
        assert visit.features is not None and step.rate is not None  # split is planned behind the last segment
        with visit.stage("encode"):
            latent_CHW = self._head.encode(visit.features)
            for rate in range(step.rate, -1, -1):
                try:
                    data = self._codec.encode(self._codec.quantise(latent_CHW, rate), rate)
                    break
                except PayloadTooLarge:
                    if rate == 0:
                        raise
        self.costs.encode_s.observe(visit.stage_ms["encode"] / 1000)
        self.costs.rate_bytes[rate].observe(len(data))
        if self.metrics:
            self.metrics.encoded(len(data))
        return Payload(Codec.FACTORIZED, rate, data)

    def _pack_image(self, visit: Visit, image: Image.Image) -> Payload:
        """The whole photo as the cloud needs it: no larger than the network's input, grey when it is grey."""
        whole = self.config.whole_image
        with visit.stage("encode"):
            small = shrink(image, self.manifest.preprocessing.resize)
            data = encode_image(small.convert("L") if is_grey(small) else small, whole.form, whole.quality)
        if len(data) > MAX_IMAGE_BYTES:
            raise PayloadTooLarge(f"the photo has {len(data)} bytes as {whole.form}, the cap is {MAX_IMAGE_BYTES}")
        self.costs.image_encode_s.observe(visit.stage_ms["encode"] / 1000)
        self.costs.image_bytes.observe(len(data))
        return Payload(Codec.IMAGE, 0, data)

    def _ask(self, payload: Payload, visit: Visit) -> Reply:
        if self.link is None:
            raise LinkDown("no cloud is configured")
        with visit.stage("cloud"):
            reply = self.link.ask(payload, visit.left_s - FALLBACK_RESERVE_S)
        visit.up_bytes, visit.down_bytes = reply.up_bytes, reply.down_bytes
        visit.stage_ms["cloud_queue"] = 1000 * reply.answer.queue_s
        visit.stage_ms["cloud_compute"] = 1000 * reply.answer.compute_s
        macs = self.manifest.tail_macs
        if payload.codec is Codec.IMAGE:
            macs += sum(segment.macs for segment in self.manifest.segments)
        self.costs.cloud_s_per_mac.observe((reply.answer.queue_s + reply.answer.compute_s) / macs)
        return reply

    def _answer_here(self, step: Plan, visit: Visit, pixels_CHW: Floats, degraded: str | None) -> Answer:
        """The deepest exit passed; the first one is run when none was."""
        if not visit.exits:
            self._run_segment(visit, pixels_CHW)
        if degraded and self.metrics:
            self.metrics.degraded(degraded)
        route: AnswerRoute = "fallback" if degraded else "exit"
        return self._answer(route, visit.exits[-1], visit, why=step.why)

    def _answer(
        self, route: AnswerRoute, probabilities_K: NDArray[Any], visit: Visit, why: str, rate: int | None = None
    ) -> Answer:
        index = int(probabilities_K.argmax())
        local = route in ("exit", "fallback")
        visit.stage_ms["total"] = 1000 * (time.monotonic() - visit.started_s)
        cloud_s = visit.stage_ms.get("cloud_compute", 0.0) / 1000
        device_s = sum(visit.stage_ms.get(name, 0.0) for name in ("decode", "head", "encode")) / 1000
        return Answer(
            label=self.manifest.labels[index],
            index=index,
            probabilities=tuple(float(p) for p in probabilities_K),
            route=route,
            exit=self.manifest.exits[len(visit.exits) - 1].name if local else None,
            rate=rate,
            bytes_up=visit.up_bytes,
            bytes_down=visit.down_bytes,
            stage_ms={name: round(value, 3) for name, value in visit.stage_ms.items()},
            degraded=route == "fallback",
            cost_usd=self.config.prices.usd(visit.up_bytes, cloud_s, device_s),
            why=why,
        )

    def _warm_up(self) -> None:
        """Run the head on a blank image a few times, so that the estimates start from the truth."""
        blank_CHW = np.zeros((3, *self.manifest.preprocessing.crop), np.float32)
        for _ in range(3):
            visit = Visit(self.config.deadline_s)
            for index in range(self._head.exits):
                started_s = time.monotonic()
                source = blank_CHW if visit.features is None else visit.features
                visit.features, _ = self._head.segment(index, source)
                self.costs.segment_s[index].observe(time.monotonic() - started_s)
            started_s = time.monotonic()
            self._head.encode(visit.features)  # type: ignore[arg-type]
            self.costs.encode_s.observe(time.monotonic() - started_s)


def exit_confidence(manifest: Manifest, epsilon: float) -> float:
    """The certified threshold of the largest epsilon that is no larger than asked; never exit when there is none."""
    allowed = [threshold for threshold in manifest.thresholds if threshold.epsilon <= epsilon + 1e-12]
    return max(allowed, key=lambda threshold: threshold.epsilon).confidence if allowed else NEVER


def as_image(photo: Photo) -> Image.Image:
    """RGB image of whatever was given. Raises InvalidInput."""
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    if isinstance(photo, (str, os.PathLike)):
        path = Path(photo)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES} bytes")
            photo = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path}: {error.strerror}") from error
    return open_image(photo)


def degraded_reason(error: IsthmusError) -> str:
    """Label of isthmus_edge_degraded_responses_total."""
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, PayloadTooLarge):
        return "too_large"
    return "cloud_down" if isinstance(error, LinkDown) else "rejected"
