"""A loaded bundle answers payloads: decode, then the tail. Synchronous; knows nothing about queues or gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.errors import InvalidInput, IsthmusError, Overloaded, ServiceError
from models.types import BundleInfo, Codec, Payload
from models.vision.images import open_image, preprocess
from models.vision.tail import Tail

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Decoded:
    """A payload as the tail takes it: a latent (C, H, W) with its rate, or an image (3, H, W)."""

    array: Floats
    rate: int


class Answerer:
    """One bundle's codec and tail."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError when tables or weights do not fit."""
        self.manifest = bundle.manifest
        self.info = BundleInfo(
            fingerprint=bundle.fingerprint,
            name=self.manifest.name,
            task=self.manifest.task,
            labels=len(self.manifest.labels),
            rates=len(self.manifest.bottleneck.rates),
        )
        self._codec = bundle.codec()
        self._tail = Tail(bundle)

    def check(self, payload: Payload) -> None:
        """Raise PayloadTooLarge or InvalidInput when size or rate alone tell that this bundle cannot read it."""
        if payload.codec is Codec.FACTORIZED:
            self._codec.check(len(payload.data), payload.rate)

    def answer(self, codec: Codec, payloads: Sequence[Payload]) -> list[tuple[float, ...] | IsthmusError]:
        """Probabilities or an error for each payload of one codec; a bad one harms no other."""
        results: list[tuple[float, ...] | IsthmusError] = []
        decoded: dict[int, Decoded] = {}
        for index, payload in enumerate(payloads):
            outcome = self._decode(payload)
            if isinstance(outcome, Decoded):
                decoded[index] = outcome
            results.append(InvalidInput("not computed") if isinstance(outcome, Decoded) else outcome)
        for index, probabilities in zip(decoded, self._compute(codec, list(decoded.values())), strict=True):
            results[index] = probabilities
        return results

    def warm_up(self) -> None:
        """Run both ways once, so that the first device does not pay for the first call."""
        latent_CHW = np.zeros(self.manifest.bottleneck.latent, np.float32)
        image_3HW = np.zeros((3, *self.manifest.preprocessing.crop), np.float32)
        self._tail.answer_latents([latent_CHW], [0])
        self._tail.answer_images([image_3HW])

    def _decode(self, payload: Payload) -> Decoded | IsthmusError:
        try:
            if payload.codec is Codec.IMAGE:
                return Decoded(preprocess(open_image(payload.data), self.manifest.preprocessing), 0)
            integers_CHW = self._codec.decode(payload.data, payload.rate)
            return Decoded(self._codec.dequantise(integers_CHW, payload.rate), payload.rate)
        except IsthmusError as error:
            return error
        except MemoryError:
            return Overloaded("not enough memory for this input")

    def _compute(self, codec: Codec, inputs: Sequence[Decoded]) -> list[tuple[float, ...] | IsthmusError]:
        """Answer a batch; when that fails, each input alone, so that one cannot take the others down."""
        if not inputs:
            return []
        try:
            arrays = [decoded.array for decoded in inputs]
            if codec is Codec.IMAGE:
                rows = self._tail.answer_images(arrays)
            else:
                rows = self._tail.answer_latents(arrays, [decoded.rate for decoded in inputs])
        except (RuntimeError, MemoryError) as error:  # PyTorch reports exhausted memory as RuntimeError
            if len(inputs) > 1:
                return [answer for decoded in inputs for answer in self._compute(codec, [decoded])]
            kind = Overloaded if isinstance(error, MemoryError) or "memory" in str(error) else ServiceError
            return [kind("the tail failed on this input")]
        return [
            tuple(row.tolist()) if np.isfinite(row).all() else ServiceError("the tail gave no finite answer")
            for row in rows
        ]
