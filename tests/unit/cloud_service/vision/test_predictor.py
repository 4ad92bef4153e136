from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus.cloud_service.vision.decode_process import Pixels, decode
from isthmus.cloud_service.vision.predictor import Kind, Predictor
from isthmus.models.errors import (
    BundleError,
    InvalidInput,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    ServiceError,
)
from isthmus.models.messages import CloudRequest, Codec, Payload, TapInfo, TaskInfo
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import Tail


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    made = Predictor(tiny_bundle)
    made.warm_up()
    return made


LATENTS, IMAGES = Kind(1, (0,)), Kind(None, (0,))


def latent_payload(bundle: Bundle, seed: int, rate: int, tap: int = 1) -> Payload:
    codec = bundle.codec(tap)
    latent_CHW = np.random.default_rng(seed).normal(size=codec.shape_CHW).astype(np.float32)
    return Payload(Codec.BOTTLENECK, tap, rate, codec.encode(codec.quantise(latent_CHW, rate), rate))


def pixels(predictor: Predictor, photo: Image.Image) -> Pixels:
    """As `ImageDecoder` gives them."""
    return decode(png(photo), predictor.image_input)


def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_batch_of_mixed_rates_is_each_input_alone(predictor: Predictor, tiny_bundle: Bundle) -> None:
    payloads = [latent_payload(tiny_bundle, seed, seed % 2) for seed in range(5)]
    together = predictor.predict(LATENTS, payloads)
    alone = [predictor.predict(LATENTS, [payload])[0] for payload in payloads]
    np.testing.assert_allclose(together, alone, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("tap", [0, 1])
@pytest.mark.parametrize("tasks", [(0,), (1,), (0, 1)])
def test_every_tap_answers_the_tasks_asked_for(
    predictor: Predictor, tiny_bundle: Bundle, tap: int, tasks: tuple[int, ...]
) -> None:
    codec, payload = tiny_bundle.codec(tap), latent_payload(tiny_bundle, 3, 1, tap)
    (predict,) = predictor.predict(Kind(tap, tasks), [payload])
    latent_CHW = codec.dequantise(codec.decode(payload.data, 1), 1)
    expected = Tail(tiny_bundle).latents_to_tasks(tap, [latent_CHW], [1], tasks)
    assert isinstance(predict, tuple) and len(predict) == len(tasks)
    for probabilities, expected_1K in zip(predict, expected, strict=True):
        np.testing.assert_allclose(probabilities, expected_1K[0], atol=1e-5)


def test_a_whole_image_answers_several_tasks(predictor: Predictor, photo: Image.Image) -> None:
    (predict,) = predictor.predict(Kind(None, (0, 1)), [pixels(predictor, photo)])
    assert isinstance(predict, tuple)
    assert [(len(p), sum(p)) for p in predict] == [(2, pytest.approx(1)), (3, pytest.approx(1))]


def test_info_lists_tasks_and_taps(predictor: Predictor) -> None:
    assert predictor.info.tasks == (TaskInfo("defect", 2), TaskInfo("colour", 3))
    assert predictor.info.taps == (TapInfo("light", 3), TapInfo("deep", 2))


def test_whole_images_go_through_the_unsplit_model(
    predictor: Predictor, tiny_bundle: Bundle, photo: Image.Image
) -> None:
    (predict,) = predictor.predict(IMAGES, [pixels(predictor, photo)])
    expected_BK = Tail(tiny_bundle).answer_images([preprocess(photo, tiny_bundle.manifest.preprocessing)])
    np.testing.assert_allclose(predict, expected_BK[:1], atol=1e-6)  # type: ignore[arg-type]


def test_a_corrupt_payload_affects_no_other_of_its_batch(predictor: Predictor, tiny_bundle: Bundle) -> None:
    good = latent_payload(tiny_bundle, 0, 1)
    corrupt = Payload(Codec.BOTTLENECK, 1, 1, b"\x01\x02\x03\x04" * 10)
    results = predictor.predict(LATENTS, [good, corrupt, good])
    assert isinstance(results[1], PayloadCorrupt)
    np.testing.assert_allclose(results[0], results[2])  # type: ignore[arg-type]
    np.testing.assert_allclose(results[0], predictor.predict(LATENTS, [good])[0], atol=1e-5)


def test_an_input_that_exhausts_the_memory_is_refused_alone(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, good = Predictor(tiny_bundle), latent_payload(tiny_bundle, 0, 1)
    greedy = latent_payload(tiny_bundle, 1, 1)
    decode = predictor._codecs[1].decode

    def exhausting(data: bytes, rate: int) -> Any:
        if data == greedy.data:
            raise MemoryError
        return decode(data, rate)

    monkeypatch.setattr(predictor._codecs[1], "decode", exhausting)
    results = predictor.predict(LATENTS, [good, greedy, good])
    assert [type(result) for result in results] == [tuple, Overloaded, tuple]


def request(tap: int, rate: int, data: bytes = b"\1\0\0\0", tasks: tuple[int, ...] = (0,)) -> CloudRequest:
    return CloudRequest(1, bytes(8), 1.0, Payload(Codec.BOTTLENECK, tap, rate, data), tasks)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (request(1, 0, bytes(4097)), PayloadTooLarge, "the bundle's cap is 4096"),
        (request(1, 2), InvalidInput, "rate 2 does not exist, the bundle has rates 0 to 1"),
        (request(0, 3), InvalidInput, "rate 3 does not exist, the bundle has rates 0 to 2"),
        (request(2, 0), InvalidInput, "tap 2 does not exist, the bundle has 0 light, 1 deep"),
        (request(1 << 25, 63), InvalidInput, "tap 33554432 does not exist"),
        (request(0, 0, tasks=(2,)), InvalidInput, "task 2 does not exist, the bundle has 0 defect, 1 colour"),
        (request(0, 0, tasks=tuple(range(32))), InvalidInput, "task 2 does not exist"),
        (
            CloudRequest(1, bytes(8), 1.0, Payload(Codec.IMAGE, 0, 0, b"x"), (1, 5)),
            InvalidInput,
            "task 5 does not exist",
        ),
    ],
)
def test_what_the_bundle_does_not_have_is_refused_by_name(
    predictor: Predictor, asked: CloudRequest, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        predictor.check(asked)


@pytest.mark.parametrize("asked", [request(0, 2, tasks=(0, 1)), request(1, 1, tasks=(1,))])
def test_what_the_bundle_has_is_accepted(predictor: Predictor, asked: CloudRequest) -> None:
    predictor.check(asked)


class BrokenTail:
    """Fails on more than one input, or always, or gives no finite answer."""

    def __init__(self, error: Exception | None, alone_too: bool) -> None:
        self.error, self.alone_too = error, alone_too

    def latents_to_tasks(self, tap: int, latents: Sequence[Any], rates: Sequence[int], tasks: Sequence[int]) -> Any:
        if self.error is not None and (self.alone_too or len(latents) > 1):
            raise self.error
        value = np.nan if self.error is None else 0.5
        return [np.full((len(latents), 2), value, np.float32) for _ in tasks]


@pytest.mark.parametrize(
    ("error", "alone_too", "outcome"),
    [
        (RuntimeError("a kernel failed"), False, tuple),
        (RuntimeError("a kernel failed"), True, ServiceError),
        (BundleError("tail: the graph failed"), False, tuple),
        (BundleError("tail: the graph failed"), True, ServiceError),
        (MemoryError(), True, Overloaded),
        (Overloaded("full"), True, Overloaded),
        (RuntimeError("not enough memory: you tried to allocate 99 GB"), True, Overloaded),
        (None, True, ServiceError),
    ],
)
def test_a_failing_tail_is_tried_with_each_input_alone(
    tiny_bundle: Bundle, error: Exception | None, alone_too: bool, outcome: type
) -> None:
    predictor = Predictor(tiny_bundle)
    predictor._tail = BrokenTail(error, alone_too)  # type: ignore[assignment]
    results = predictor.predict(LATENTS, [latent_payload(tiny_bundle, seed, 0) for seed in range(3)])
    assert [type(result) for result in results] == [outcome] * 3


def test_an_image_far_larger_than_the_network_s_input_is_refused(predictor: Predictor) -> None:
    """The cap is a megapixel, or 16 squares of the network's input. The device sends one at the network's size."""
    for size in ((1024, 1024), (65_535, 16)):
        (answer,) = predictor.predict(IMAGES, [pixels(predictor, Image.new("L", size))])
        assert isinstance(answer, tuple)
    with pytest.raises(InvalidInput, match="at most 1048576"):
        pixels(predictor, Image.new("L", (1024, 1025)))


def test_refusals_keep_no_frames_alive(predictor: Predictor, tiny_bundle: Bundle) -> None:
    damaged = latent_payload(tiny_bundle, 1, 1)
    (refusal,) = predictor.predict(LATENTS, [replace(damaged, data=damaged.data[:-1])])
    assert isinstance(refusal, IsthmusError)
    assert (refusal.__traceback__, refusal.__cause__, refusal.__context__) == (None, None, None)
