"""Payloads of the tiny bundle: what is encoded, within which bounds, and what the cost model learns of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision import payloads as module
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.payloads import PayloadEncoder
from isthmus.edge_agent.vision.request import InferenceRequest, RequestState
from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import PayloadTooLarge
from isthmus.models.messages import Codec
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import ImageForm, ImageWay

DEAREST = OperatingPoint(tap=0, width=0, rate=2)


def way(form: ImageForm) -> ImageWay:
    return ImageWay(form=form, quality=75, mean_bytes=1000, accuracy=1, agreement=1)


@pytest.fixture
def costs(tiny_bundle: Bundle) -> Costs:
    return Costs(tiny_bundle.manifest, open_profile("wifi"))


@pytest.fixture
def codecs(tiny_bundle: Bundle) -> list[ContextualCodec]:
    return [tiny_bundle.codec(tap) for tap in range(2)]


@pytest.fixture
def encoder(tiny_bundle: Bundle, codecs: list[ContextualCodec], costs: Costs) -> PayloadEncoder:
    resize = tiny_bundle.manifest.preprocessing.resize
    spec = tiny_bundle.manifest.preprocessing.model_copy(update={"resize": resize})
    return PayloadEncoder(Head(tiny_bundle, 1), codecs, costs, spec, None)


@pytest.fixture
def state() -> RequestState:
    return RequestState(InferenceRequest((0,), (), forced_split=False, no_exit=None), deadline_s=10.0)


@pytest.fixture
def pixels_CHW(tiny_bundle: Bundle, photo: Image.Image) -> np.ndarray:
    return preprocess(photo, tiny_bundle.manifest.preprocessing)


def test_a_bottleneck_names_its_tap_and_rate_and_its_size_is_recorded(
    encoder: PayloadEncoder, state: RequestState, costs: Costs, pixels_CHW: np.ndarray
) -> None:
    before_s = costs.encode_s[0][0].value
    point, payload = encoder.bottleneck(state, DEAREST, pixels_CHW)
    assert point == DEAREST
    assert (payload.codec, payload.tap, payload.rate) == (Codec.BOTTLENECK, 0, 2)
    assert costs.point_bytes[DEAREST].value == len(payload.data)
    assert costs.encode_s[0][0].value != before_s and state.stage_ms.keys() == {"encode"}


def test_over_the_cap_the_next_cheaper_rate_is_used_and_recorded_as_such(
    encoder: PayloadEncoder,
    state: RequestState,
    costs: Costs,
    codecs: list[ContextualCodec],
    pixels_CHW: np.ndarray,
) -> None:
    before = costs.point_bytes[DEAREST].value
    codecs[0].max_bytes = len(encoder.bottleneck(state, OperatingPoint(0, 0, 1), pixels_CHW)[1].data)
    point, payload = encoder.bottleneck(state, DEAREST, pixels_CHW)
    assert (point, payload.rate) == (OperatingPoint(0, 0, 1), 1)
    assert costs.point_bytes[DEAREST].value == before


def test_over_the_cap_at_every_rate_nothing_is_recorded(
    encoder: PayloadEncoder,
    state: RequestState,
    costs: Costs,
    codecs: list[ContextualCodec],
    pixels_CHW: np.ndarray,
) -> None:
    codecs[0].max_bytes, before = 4, {point: size.value for point, size in costs.point_bytes.items()}
    with pytest.raises(PayloadTooLarge):
        encoder.bottleneck(state, DEAREST, pixels_CHW)
    assert {point: size.value for point, size in costs.point_bytes.items()} == before


def test_a_whole_image_is_shrunk_and_its_size_is_recorded(
    encoder: PayloadEncoder, state: RequestState, costs: Costs, photo: Image.Image
) -> None:
    payload = encoder.whole_image(state, photo.resize((640, 320)).convert("L"), way("png"))
    assert payload.codec is Codec.IMAGE and costs.image_bytes.value == len(payload.data)
    with Image.open(io.BytesIO(payload.data)) as sent:
        assert (sent.size, sent.mode, sent.format) == ((128, 64), "L", "PNG")


def test_a_whole_image_over_the_cap_is_refused_and_not_recorded(
    encoder: PayloadEncoder,
    state: RequestState,
    costs: Costs,
    photo: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    before = costs.image_bytes.value
    with pytest.raises(PayloadTooLarge, match="as jpeg, the cap is 10"):
        encoder.whole_image(state, photo, way("jpeg"))
    assert costs.image_bytes.value == before
