from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.errors import BundleError
from isthmus.models.vision.bundle import Bundle
from tests.conftest import Parts, paper_tables


def test_the_fingerprint_is_the_manifests(paper: Parts, tmp_path: Path) -> None:
    opened = Bundle.open(paper.write(tmp_path / "b"))
    assert opened.fingerprint.hex() == opened.manifest.fingerprint and len(opened.fingerprint) == 32


def test_codec_has_the_tables_shape_and_cap_of_the_manifest(paper: Parts, tmp_path: Path) -> None:
    codec = Bundle.open(paper.write(tmp_path / "b")).codec(0)
    assert (codec.shape_CHW, codec.max_bytes, len(codec.rates)) == ((2, 4, 4), 64, 1)
    assert [list(f) for f in codec.tables.bank()] == [[40_000, 20_000, 5_536]]


def test_every_tap_has_tables_of_its_own(tiny_bundle: Bundle) -> None:
    light, deep = tiny_bundle.codec(0), tiny_bundle.codec(1)
    assert (light.shape_CHW, len(light.rates)) == ((3, 8, 8), 3)
    assert (deep.shape_CHW, len(deep.rates)) == ((4, 8, 8), 2)


def off_by_one(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["frequencies"][0] += 1


def zero_frequency(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["frequencies"][:] = [65_535, 0, 1]


def lengths_too_long(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["lengths"][0] += 1


def no_gain(tensors: dict[str, NDArray[Any]]) -> None:
    del tensors["gain"]


def zero_gain(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["gain"][0, 1] = 0


def double_gain(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["gain"] = tensors["gain"].astype(np.float64)


def one_channel(tensors: dict[str, NDArray[Any]]) -> None:
    for name in ("gain", "low", "high"):
        tensors[name] = tensors[name][:, :1].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (off_by_one, "table 0: frequencies must add up to"),
        (zero_frequency, "table 0: needs 2 to 512 frequencies >= 1"),
        (lengths_too_long, "tables have 4 frequencies, there are 3"),
        (no_gain, "tensor gain is missing"),
        (zero_gain, "gains must be positive"),
        (double_gain, "tensor gain is float64"),
        (one_channel, "tables are for 1 channels, expected 2"),
    ],
)
def test_broken_tables_are_refused(
    paper: Parts, tmp_path: Path, change: Callable[[dict[str, NDArray[Any]]], None], message: str
) -> None:
    tensors = paper_tables()
    change(tensors)
    opened = Bundle.open(paper.replace(tmp_path / "b", "tables.safetensors", safetensors.numpy.save(tensors)))
    with pytest.raises(BundleError) as caught:
        opened.codec(0)
    assert message in str(caught.value)


def test_tables_survive_the_way_through_tensors() -> None:
    tensors = paper_tables()
    again = contextual.to_tensors(contextual.from_tensors(tensors, 1))
    assert tensors.keys() == again.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype
