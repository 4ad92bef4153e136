"""A loaded bundle predicts from payloads and pixels: decode, then run the tail. Synchronous; no queues, no gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.cloud_service.vision.decode_process import ImageInput, Pixels
from isthmus.models.errors import InvalidInput, IsthmusError, Overloaded, ServiceError
from isthmus.models.messages import BundleInfo, CloudRequest, Codec, OutputTensor, Payload, TapInfo, TaskInfo
from isthmus.models.torch_device import CPU
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import View, normalise
from isthmus.models.vision.outputs import Raw, finish, named
from isthmus.models.vision.tail import open_tail
from isthmus.models.vision.tasks import AnyTask

Floats = NDArray[np.float32]
MIN_IMAGE_PIXELS = 1 << 20  # the pixel cap of a bundle with a small input; a megapixel decodes in about 10 ms
MAX_ASPECT = 16  # a device sends the shorter side at the network's size, so the cap is 16 squares of it

# Of each task asked for, in the bundle's order: probabilities where it classifies, else its tensors.
TaskAnswers = tuple[tuple[float, ...] | tuple[OutputTensor, ...], ...]


@dataclass(frozen=True)
class Kind:
    """What payloads of one batch have in common. `tap` is None for whole images."""

    tap: int | None
    tasks: tuple[int, ...]


@dataclass(frozen=True)
class Decoded:
    """Input of the tail: a latent (C, H, W) with its rate, or an image (3, H, W)."""

    array: Floats
    rate: int


class Predictor:
    """Codecs and tail of one bundle."""

    def __init__(self, bundle: Bundle, device: torch.device = CPU) -> None:
        """`device`: of the tail. Raises BundleError when tables or weights do not fit the manifest."""
        self.manifest = bundle.manifest
        self.info = info_of(bundle)
        self._codecs = [bundle.codec(tap) for tap in range(len(self.manifest.taps))]
        self._tail = open_tail(bundle, device)
        spec = self.manifest.preprocessing
        max_pixels = max(MIN_IMAGE_PIXELS, MAX_ASPECT * spec.resize**2)
        self.image_input = ImageInput(max_pixels, View.of(spec))

    @property
    def device(self) -> torch.device:
        """Where the tail is computed: the CPU also where ONNX Runtime has nothing for the device asked for."""
        return self._tail.device

    def check(self, request: CloudRequest) -> None:
        """Raises InvalidInput or PayloadTooLarge when the request's fields show that this bundle cannot answer it."""
        tasks, taps = self.info.tasks, self.info.taps
        for task in request.tasks:
            if task >= len(tasks):
                raise InvalidInput(f"task {task} does not exist, the bundle has {numbered(tasks)}")
        payload = request.payload
        if payload.codec is not Codec.BOTTLENECK:
            return
        if payload.tap >= len(taps):
            raise InvalidInput(f"tap {payload.tap} does not exist, the bundle has {numbered(taps)}")
        self._codecs[payload.tap].check(len(payload.data), payload.rate)

    def predict(self, kind: Kind, inputs: Sequence[Payload | Pixels]) -> list[TaskAnswers | IsthmusError]:
        """The answers or an error for each input of one kind; a bad payload affects no other.

        A whole image comes as the pixels (H, W, 3) of `image_input`.
        """
        results: list[TaskAnswers | IsthmusError] = []
        decoded: dict[int, Decoded] = {}
        for index, given in enumerate(inputs):
            outcome = self._decode(given) if isinstance(given, Payload) else self._normalise(given)
            if isinstance(outcome, Decoded):
                decoded[index] = outcome
            results.append(InvalidInput("not computed") if isinstance(outcome, Decoded) else outcome)
        for index, answers in zip(decoded, self._compute(kind, list(decoded.values())), strict=True):
            results[index] = answers
        return results

    def warm_up(self) -> None:
        """Run each tap and the whole-image path once, so that the first request does not pay for the first call."""
        tasks = range(len(self.info.tasks))
        for index, tap in enumerate(self.manifest.taps):
            self._tail.latents_to_tasks(index, [np.zeros(tap.latent, np.float32)], [0], tasks)
        self._tail.images_to_tasks([np.zeros((3, *self.manifest.preprocessing.crop), np.float32)], tasks)

    def _normalise(self, pixels_HW3: Pixels) -> Decoded:
        return Decoded(normalise(pixels_HW3, self.manifest.preprocessing), 0)

    def _decode(self, payload: Payload) -> Decoded | IsthmusError:
        try:
            codec = self._codecs[payload.tap]
            return Decoded(codec.dequantise(codec.decode(payload.data, payload.rate), payload.rate), payload.rate)
        except IsthmusError as error:
            error.__cause__ = error.__context__ = None  # they and the traceback keep the arrays of their frames alive
            return error.with_traceback(None)
        except MemoryError:
            return Overloaded("not enough memory for this input")

    def _compute(self, kind: Kind, inputs: Sequence[Decoded]) -> list[TaskAnswers | IsthmusError]:
        """Run the tail on a batch; when that fails, on each input alone, so that one cannot fail the others."""
        if not inputs:
            return []
        try:
            arrays = [decoded.array for decoded in inputs]
            if kind.tap is None:
                answers = self._tail.images_to_tasks(arrays, kind.tasks)
            else:
                rates = [decoded.rate for decoded in inputs]
                answers = self._tail.latents_to_tasks(kind.tap, arrays, rates, kind.tasks)
        except (RuntimeError, MemoryError, IsthmusError) as error:  # PyTorch reports exhausted memory as RuntimeError
            if len(inputs) > 1:
                return [answer for decoded in inputs for answer in self._compute(kind, [decoded])]
            exhausted = isinstance(error, MemoryError | Overloaded) or "memory" in str(error)
            error_kind = Overloaded if exhausted else ServiceError
            return [error_kind("the tail failed on this input")]
        return [self._finish(kind.tasks, answers, index) for index in range(len(inputs))]

    def _finish(self, tasks: Sequence[int], answers: Sequence[Floats | Raw], index: int) -> TaskAnswers | IsthmusError:
        """The answers to the input of this index in the batch."""
        try:
            return tuple(
                self._answer(self.manifest.tasks[task], answer, index)
                for task, answer in zip(tasks, answers, strict=True)
            )
        except ValueError:
            return ServiceError("the tail gave no finite answer")

    def _answer(self, task: AnyTask, answer: Floats | Raw, index: int) -> tuple[float, ...] | tuple[OutputTensor, ...]:
        """Raises ValueError for values that are none."""
        if isinstance(answer, np.ndarray):
            if not np.isfinite(answer[index]).all():
                raise ValueError("values that are not finite")
            return tuple(answer[index].tolist())
        size = self.manifest.preprocessing.crop
        row = {name: batch[index] for name, batch in answer.items()}
        return named(task, finish(task, row, size), size)


def info_of(bundle: Bundle) -> BundleInfo:
    """What the service declares of a bundle."""
    manifest = bundle.manifest
    return BundleInfo(
        fingerprint=bundle.fingerprint,
        name=manifest.name,
        tasks=tuple(TaskInfo(task.name, task.channels, task.kind) for task in manifest.tasks),
        taps=tuple(TapInfo(tap.name, len(tap.widths[0].rates)) for tap in manifest.taps),
    )


def numbered(entries: Sequence[TaskInfo | TapInfo]) -> str:
    """The indices and names that exist, for an error message."""
    return ", ".join(f"{index} {entry.name}" for index, entry in enumerate(entries))
