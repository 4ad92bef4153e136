from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cloud_service.inference import Answerer
from models.bundle import Bundle
from models.errors import InvalidInput, Overloaded, PayloadCorrupt, PayloadTooLarge, ServiceError
from models.types import Codec, Payload
from models.vision.images import preprocess
from models.vision.tail import Tail


@pytest.fixture(scope="module")
def answerer(tiny_bundle: Bundle) -> Answerer:
    made = Answerer(tiny_bundle)
    made.warm_up()
    return made


def latent_payload(bundle: Bundle, seed: int, rate: int) -> Payload:
    codec = bundle.codec()
    latent_CHW = np.random.default_rng(seed).normal(size=codec.shape_CHW).astype(np.float32)
    return Payload(Codec.FACTORIZED, rate, codec.encode(codec.quantise(latent_CHW, rate), rate))


def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_batch_of_mixed_rates_is_each_input_alone(answerer: Answerer, tiny_bundle: Bundle) -> None:
    payloads = [latent_payload(tiny_bundle, seed, seed % 2) for seed in range(5)]
    together = answerer.answer(Codec.FACTORIZED, payloads)
    alone = [answerer.answer(Codec.FACTORIZED, [payload])[0] for payload in payloads]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_whole_images_go_through_the_unsplit_model(answerer: Answerer, tiny_bundle: Bundle, photo: Image.Image) -> None:
    (answer,) = answerer.answer(Codec.IMAGE, [Payload(Codec.IMAGE, 0, png(photo))])
    expected_BK = Tail(tiny_bundle).answer_images([preprocess(photo, tiny_bundle.manifest.preprocessing)])
    np.testing.assert_allclose(answer, expected_BK[0], atol=1e-6)


def test_poison_harms_no_batch_mate(answerer: Answerer, tiny_bundle: Bundle) -> None:
    good = latent_payload(tiny_bundle, 0, 1)
    poison = Payload(Codec.FACTORIZED, 1, b"\x01\x02\x03\x04" * 10)
    results = answerer.answer(Codec.FACTORIZED, [good, poison, good])
    assert isinstance(results[1], PayloadCorrupt)
    np.testing.assert_allclose(results[0], results[2])
    np.testing.assert_allclose(results[0], answerer.answer(Codec.FACTORIZED, [good])[0], atol=1e-5)


def test_a_broken_image_harms_no_batch_mate(answerer: Answerer, photo: Image.Image) -> None:
    payloads = [Payload(Codec.IMAGE, 0, data) for data in (png(photo), b"broken", png(photo)[:200])]
    results = answerer.answer(Codec.IMAGE, payloads)
    assert [type(result) for result in results] == [tuple, InvalidInput, InvalidInput]


def test_an_input_that_exhausts_the_memory_is_refused_alone(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer, good = Answerer(tiny_bundle), latent_payload(tiny_bundle, 0, 1)
    greedy = latent_payload(tiny_bundle, 1, 1)
    decode = answerer._codec.decode

    def exhausting(data: bytes, rate: int) -> Any:
        if data == greedy.data:
            raise MemoryError
        return decode(data, rate)

    monkeypatch.setattr(answerer._codec, "decode", exhausting)
    results = answerer.answer(Codec.FACTORIZED, [good, greedy, good])
    assert [type(result) for result in results] == [tuple, Overloaded, tuple]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (Payload(Codec.FACTORIZED, 0, bytes(4097)), PayloadTooLarge),
        (Payload(Codec.FACTORIZED, 2, b"\x01\x00\x00\x00"), InvalidInput),
    ],
)
def test_size_and_rate_are_checked_against_the_bundle(
    answerer: Answerer, payload: Payload, error: type[Exception]
) -> None:
    with pytest.raises(error):
        answerer.check(payload)


class BrokenTail:
    """Fails on more than one input, or always, or gives no finite answer."""

    def __init__(self, error: Exception | None, alone_too: bool) -> None:
        self.error, self.alone_too = error, alone_too

    def answer_latents(self, latents: Sequence[Any], rates: Sequence[int]) -> Any:
        if self.error is not None and (self.alone_too or len(latents) > 1):
            raise self.error
        return np.full((len(latents), 2), np.nan if self.error is None else 0.5, np.float32)


@pytest.mark.parametrize(
    ("error", "alone_too", "outcome"),
    [
        (RuntimeError("a kernel failed"), False, tuple),
        (RuntimeError("a kernel failed"), True, ServiceError),
        (MemoryError(), True, Overloaded),
        (RuntimeError("not enough memory: you tried to allocate 99 GB"), True, Overloaded),
        (None, True, ServiceError),
    ],
)
def test_a_failing_tail_is_tried_with_each_input_alone(
    tiny_bundle: Bundle, error: Exception | None, alone_too: bool, outcome: type
) -> None:
    answerer = Answerer(tiny_bundle)
    answerer._tail = BrokenTail(error, alone_too)  # type: ignore[assignment]
    results = answerer.answer(Codec.FACTORIZED, [latent_payload(tiny_bundle, seed, 0) for seed in range(3)])
    assert [type(result) for result in results] == [outcome] * 3
