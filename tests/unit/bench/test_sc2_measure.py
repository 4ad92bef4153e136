from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.models.messages import Codec
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.tail import Tail
from isthmus.protos.limits import MAX_FRAMING_BYTES
from tests.bench.sc2_measure import SHAPE, Bench, data_bytes, wire_bytes
from tests.bench.sc2_ways import lossless, own_ways, trained_way
from tests.unit.bench.fakes import FakeBaseline, way


@pytest.fixture
def bench(tiny_bundle: Bundle, images: list[Image.Image], tmp_path: Path) -> Bench:
    return Bench(images, tiny_bundle.manifest.preprocessing, tiny_bundle.fingerprint, tmp_path / "measured")


def test_data_size_is_counted_as_sc2bench_does() -> None:
    data = bytes(700)
    assert data_bytes(way("n0"), data) == sys.getsizeof(pickle.dumps({"strings": [[data]], "shape": SHAPE}))
    assert 800 < data_bytes(way("n0"), data) < 815
    assert data_bytes(way("jpeg", codec=Codec.IMAGE), data) == 700, "codecs: the file itself"


@pytest.mark.parametrize("sides", [(1, 1), (7, 9), (75, 75), (255, 19)])
def test_the_shape_of_a_latent_does_not_matter(sides: tuple[int, int]) -> None:
    one, other = (len(pickle.dumps({"strings": [[b"x"]], "shape": shape})) for shape in (SHAPE, torch.Size(sides)))
    assert one == other


@pytest.mark.parametrize("codec", list(Codec))
def test_wire_bytes_are_a_whole_message(codec: Codec, tiny_bundle: Bundle) -> None:
    for size in (0, 1, 300, 9000):
        framing = wire_bytes(way("m", codec=codec), bytes(size), tiny_bundle.fingerprint, 542) - size
        assert 20 < framing <= MAX_FRAMING_BYTES + 5


def test_columns_are_what_the_way_does(bench: Bench, tiny_bundle: Bundle, head: Head, tail: Tail) -> None:
    chosen = list(own_ways(tiny_bundle, head, tail))[4]
    steps: list[None] = []
    found = bench.measure(chosen, lambda: steps.append(None))
    payloads = [chosen.encode(bench.photo(image)) for image in bench.images]
    assert found.payload_bytes_N.tolist() == [len(data) for data in payloads] and len(steps) == len(bench.images)
    assert chosen.decode is not None
    assert found.answer_N.tolist() == [chosen.answer(chosen.decode(data)).argmax() for data in payloads]
    assert (found.data_bytes_N - found.payload_bytes_N > 90).all()
    assert (found.wire_bytes_N > found.payload_bytes_N).all()
    assert (found.encode_ms_N > 0).all() and (found.cloud_ms_N > found.decode_ms_N).all()


def test_the_cloud_model_is_measured_like_any_way(bench: Bench, tiny_bundle: Bundle, tail: Tail) -> None:
    found = bench.measure(lossless(tiny_bundle, tail))
    wanted = tail.answer_images([bench.photo(image).pixels_CHW for image in bench.images]).argmax(1)
    assert found.answer_N.tolist() == wanted.tolist()
    np.testing.assert_array_equal(found.data_bytes_N, found.payload_bytes_N)


def test_what_was_measured_is_kept(bench: Bench) -> None:
    baseline = FakeBaseline()
    first = bench.measure(trained_way(baseline))  # type: ignore[arg-type]
    assert np.isnan(first.decode_ms_N).all() and (first.cloud_ms_N > 0).all()
    encoded, steps = baseline.encoded, list[None]()
    again = bench.measure(trained_way(baseline), lambda: steps.append(None))  # type: ignore[arg-type]
    assert baseline.encoded == encoded + 1, "one photo tells whether it is the same way"
    assert len(steps) == len(bench.images)
    for name, column in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), column)


@pytest.mark.parametrize("change", [{"length": 21}, {"offset": 0.2}, {"setting": "price 1"}, {"method": "n4"}])
def test_another_way_is_measured_anew(bench: Bench, change: dict[str, float]) -> None:
    before, after = FakeBaseline(), replace(FakeBaseline(), **change)  # type: ignore[arg-type]
    bench.measure(trained_way(before))  # type: ignore[arg-type]
    bench.measure(trained_way(after))  # type: ignore[arg-type]
    assert after.encoded == len(bench.images) + 1 and len(list(bench.folder.iterdir())) == 2


def test_fewer_photos_are_another_measurement(bench: Bench) -> None:
    bench.measure(trained_way(FakeBaseline()))  # type: ignore[arg-type]
    fewer = replace(bench, images=bench.images[:2])
    assert len(fewer.measure(trained_way(FakeBaseline())).answer_N) == 2  # type: ignore[arg-type]


def test_an_interrupted_way_leaves_nothing(bench: Bench) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(trained_way(FakeBaseline()), stop)  # type: ignore[arg-type]
    assert not bench.folder.exists()
