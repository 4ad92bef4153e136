from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.messages import Codec
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import Tail
from tests.bench.image_codecs import CODECS
from tests.bench.sc2_ways import (
    METHODS,
    Photo,
    Way,
    encoder_bits,
    graph_bits,
    lossless,
    own_ways,
    trained_way,
    ways,
)
from tests.unit.bench.fakes import FakeBaseline, FakeBaselines


def graph(initializers: list[onnx.TensorProto], nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [], initializers)


def test_weights_count_by_their_type() -> None:
    arrays: list[tuple[NDArray[np.generic], int]] = [
        (np.zeros((4, 3), np.int8), 12 * 8),
        (np.zeros(5, np.float16), 5 * 16),
        (np.zeros((2, 2), np.float32), 4 * 32),
        (np.array(7, np.int64), 64),
    ]
    for array, bits in arrays:
        assert graph_bits(graph([numpy_helper.from_array(array, "w")], [])) == bits
    everything = [numpy_helper.from_array(array, f"w{i}") for i, (array, _) in enumerate(arrays)]
    assert graph_bits(graph(everything, [])) == sum(bits for _, bits in arrays)


def test_constants_and_branches_hide_no_weights() -> None:
    weight = numpy_helper.from_array(np.zeros(10, np.float32), "w")
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    branch = graph([numpy_helper.from_array(np.zeros(3, np.int8), "b")], [constant])
    choose = helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=graph([weight], []))
    assert graph_bits(graph([], [constant])) == 320
    assert graph_bits(graph([], [choose])) == 24 + 320 + 320


def test_a_type_without_a_numpy_twin_counts_too() -> None:
    half = helper.make_tensor("w", TensorProto.BFLOAT16, [6], [0.0] * 6)
    assert graph_bits(graph([half], [])) == 6 * 16


def file_bits(bundle: Bundle, name: str) -> int:
    return graph_bits(onnx.load_from_string(bundle.read(name)).graph)


def test_an_encoder_is_all_that_its_tap_needs(tiny_bundle: Bundle) -> None:
    light, deep = tiny_bundle.manifest.taps
    tables = [8 * sum(a.nbytes for a in tiny_bundle.tensors(tap.tables).values()) for tap in (light, deep)]
    assert encoder_bits(tiny_bundle, 0) == file_bits(tiny_bundle, light.encoder) + tables[0]
    trunk = file_bits(tiny_bundle, "head0.fp32.onnx") + file_bits(tiny_bundle, "head1.fp32.onnx")
    assert encoder_bits(tiny_bundle, 1) == trunk + file_bits(tiny_bundle, deep.encoder) + tables[1]
    assert 0.5 < encoder_bits(tiny_bundle, 1) / 8 / len(tiny_bundle.read("head1.fp32.onnx")) < 2, "bits, not bytes"


@pytest.fixture
def own(tiny_bundle: Bundle, head: Head, tail: Tail) -> list[Way]:
    return list(own_ways(tiny_bundle, head, tail))


@pytest.fixture
def seen(tiny_bundle: Bundle, photo: Image.Image) -> Photo:
    return Photo(photo, preprocess(photo, tiny_bundle.manifest.preprocessing))


def test_every_tap_width_and_rate_has_its_name(own: list[Way]) -> None:
    rates = ["rate 0", "rate 1", "rate 2"]
    names = [(way.method, way.setting) for way in own]
    assert names == [
        *(("ours light 0.5", rate) for rate in rates),
        *(("ours", rate) for rate in rates),
        ("ours deep", "rate 0"),
        ("ours deep", "rate 1"),
    ]
    assert [(way.tap, way.rate) for way in own] == [(0, 0), (0, 1), (0, 2), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [way.encoder_macs for way in own] == [4_000_000] * 3 + [8_000_000] * 3 + [28_000_000] * 2
    assert len({way.encoder_bits for way in own[:6]}) == 1, "one graph holds all widths"


def test_ours_is_what_the_bundle_does(tiny_bundle: Bundle, head: Head, tail: Tail, own: list[Way], seen: Photo) -> None:
    for way in own:
        x_CHW = seen.pixels_CHW
        if way.tap == 1:
            x_CHW = head.segment(1, head.segment(0, x_CHW)[0])[0]
        codec = tiny_bundle.codec(way.tap)
        width = 0 if way.method.endswith("0.5") or way.tap == 1 else 1
        data = codec.encode(codec.quantise(head.encode(way.tap, x_CHW, width), way.rate), way.rate)
        assert way.encode(seen) == data and way.decode is not None
        latent_CHW = codec.dequantise(codec.decode(data, way.rate), way.rate)
        wanted_K = tail.answer_latents(way.tap, [latent_CHW], [way.rate])[0]
        np.testing.assert_array_equal(way.answer(way.decode(data)), wanted_K)


def test_lossless_is_the_untouched_photo(tiny_bundle: Bundle, tail: Tail, seen: Photo) -> None:
    way = lossless(tiny_bundle, tail)
    assert way.decode is not None
    np.testing.assert_array_equal(way.answer(way.decode(way.encode(seen))), tail.answer_images([seen.pixels_CHW])[0])
    assert way.codec is Codec.IMAGE and way.encoder_bits == way.encoder_macs == 0


def test_trained_runs_are_wrapped(seen: Photo) -> None:
    baseline = FakeBaseline()
    way = trained_way(baseline)  # type: ignore[arg-type]
    assert (way.method, way.setting, way.encoder_bits, way.encoder_macs) == ("n0", "price 3", 16_384, 5_000_000)
    data = way.encode(seen)
    assert len(data) == 20 and way.decode is None
    np.testing.assert_array_equal(way.answer(data), baseline.answer([data])[0])


def test_all_that_is_ready_unless_asked(tiny_bundle: Bundle, head: Head, tail: Tail, baselines: FakeBaselines) -> None:
    found = {way.method for way in ways(tiny_bundle, head, tail, Path("w"), None)}
    assert found == {*CODECS, "ours", "ours deep", "ours light 0.5"}
    baselines.ready = [FakeBaseline("n4"), FakeBaseline("entropic-student")]
    more = {way.method for way in ways(tiny_bundle, head, tail, Path("w"), None)}
    assert more == found | {"n4", "entropic-student"}


def test_shipped_bundles_ask_for_no_training(
    tiny_bundle: Bundle, head: Head, tail: Tail, baselines: FakeBaselines
) -> None:
    found = ways(tiny_bundle, head, tail, Path("w"), ["ours", "webp"])
    assert {way.method for way in found} == {"webp", "ours", "ours deep", "ours light 0.5"} and not baselines.asked
    assert set(METHODS) >= {"ours", "webp"}


def test_missing_training_is_named_with_its_command(
    tiny_bundle: Bundle, head: Head, tail: Tail, baselines: FakeBaselines
) -> None:
    baselines.ready = [FakeBaseline("n4")]
    with pytest.raises(InvalidInput) as caught:
        ways(tiny_bundle, head, tail, Path("runs/my sc2"), ["n4", "n0"])
    text = str(caught.value)
    assert text.startswith("no finished runs of n0 under runs/my sc2;") and "\n" not in text
    assert text.endswith("python -m isthmus.models.recipes baselines n0 --work 'runs/my sc2'")
