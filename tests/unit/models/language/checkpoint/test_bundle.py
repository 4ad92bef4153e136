"""A language model as a bundle: what it opens as, its bytes, and bundles that lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from isthmus.models.bundle.files import write_bundle
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint import bundle
from isthmus.models.language.checkpoint.bundle import LanguageManifest, stored_tensors
from isthmus.models.language.checkpoint.checkpoint import Checkpoint, open_tokenizer
from isthmus.models.language.checkpoint.export import model_settings
from isthmus.models.language.checkpoint.weights import tensor_shapes
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.packing import STORED_BLOCK
from tests.bench.tiny_llama import write_tiny_llama

Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tied=False))


def tensors_of(source: Checkpoint) -> Tensors:
    return stored_tensors({name: source.tensor(name) for name in tensor_shapes(source.config)})


def written(folder: Path, source: Checkpoint, tensors: Tensors | None = None, **changes: Any) -> Path:
    manifest = {
        "name": "tiny",
        "licence": "none",
        "kind": "language",
        "base": source.fingerprint.hex(),
        "layers": [0, 1],
        "config": model_settings(source.config),
        "weights": "weights.safetensors",
        "tokenizer": "tokenizer",
        "training": {"command": "", "seed": 0, "seconds": 0, "machine": "", "data": "", "versions": {}},
        "scores": {},
        **changes,
    }
    files = {
        "weights.safetensors": safetensors.numpy.save(tensors_of(source) if tensors is None else tensors),
        "tokenizer": source.tokenizer.to_bytes(),
    }
    return write_bundle(folder, manifest, files, LanguageManifest)


def test_it_opens_as_the_model_in_4_bits(source: Checkpoint, tmp_path: Path) -> None:
    opened = Checkpoint.open(written(tmp_path / "b", source))
    assert opened.config == source.config and opened.name == "tiny"
    assert opened.tokenizer.fingerprint == source.tokenizer.fingerprint == open_tokenizer(tmp_path / "b").fingerprint
    for name in tensor_shapes(source.config):
        values, expected = opened.tensor(name), source.tensor(name)
        if values.ndim == 1:
            np.testing.assert_array_equal(values, expected)
            continue
        blocks = opened.blocks(name)
        assert blocks is not None and blocks.scale_NG.shape == (len(values), values.shape[1] // STORED_BLOCK)
        step_NK = np.abs(blocks.scale_NG).repeat(STORED_BLOCK, 1)
        assert (np.abs(values - expected) <= 1.01 * step_NK).all()
        assert np.abs(values - expected).mean() < 0.3 * step_NK.mean()


def test_names_of_installed_bundles_are_models(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "little", source)
    monkeypatch.setenv("ISTHMUS_BUNDLES", str(tmp_path))
    assert Checkpoint.open("little").config == source.config
    assert open_tokenizer("little").fingerprint == source.tokenizer.fingerprint
    with pytest.raises(BundleError, match="expected kind language"):
        Checkpoint.open("fashion")


def test_a_device_uses_the_codes_as_they_are_stored(source: Checkpoint, tmp_path: Path) -> None:
    opened = Checkpoint.open(written(tmp_path / "b", source))
    logits = [OnnxDecoder(opened, 16, bits, 1).extend([5, 6, 7]) for bits in (4, 8)]
    np.testing.assert_array_equal(*logits)  # quantised again in 8 bits, they would differ
    assert not np.array_equal(OnnxDecoder(source, 16, 8, 1).extend([5, 6, 7]), logits[0])


def test_fingerprint_depends_on_codes_and_scales_and_not_on_the_folder(source: Checkpoint, tmp_path: Path) -> None:
    plain = Checkpoint.open(written(tmp_path / "a", source)).fingerprint
    assert Checkpoint.open(written(tmp_path / "b", source, name="other")).fingerprint == plain
    name = "model.layers.0.mlp.up_proj.weight"
    for part in ("codes", "scale"):
        tensors = tensors_of(source)
        tensors[f"{name}.{part}"][0, 0] += 1
        assert Checkpoint.open(written(tmp_path / part, source, tensors)).fingerprint != plain


def test_bytes_are_golden(golden: Callable[[str, bytes], None]) -> None:
    """The largest weight of a block has code 0, whatever its sign; the first of two codes is the low half of a byte."""
    rising = np.arange(STORED_BLOCK, dtype=np.float32) / 8 - 4
    stored = stored_tensors({"a.weight": np.stack([rising, -rising, 0 * rising]), "b.weight": rising[:4]})
    assert stored["a.weight.scale"].tolist() == [[0.5], [-0.5], [0.0]]
    assert stored["a.weight.codes"][0].tobytes() == stored["a.weight.codes"][1].tobytes()
    assert stored["a.weight.codes"][0, 0, :8].tobytes().hex() == "0010112222323344"
    assert stored["a.weight.codes"][2].tobytes() == bytes([0x88]) * 32
    golden("language_weights_v3.safetensors", safetensors.numpy.save(stored))


Change = Callable[[Tensors], Mapping[str, NDArray[Any] | None]]
UP = "model.layers.0.mlp.up_proj.weight"
LIES: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: {f"{UP}.scale": None}, "scale is missing"),
    "no codes": (lambda t: {f"{UP}.codes": None}, "expected a vector"),
    "scales of another type": (lambda t: {f"{UP}.scale": t[f"{UP}.scale"].astype(np.float32)}, "not float16"),
    "too few scales": (lambda t: {f"{UP}.scale": t[f"{UP}.scale"][:-1]}, "not float16 of shape"),
    "scales that are not finite": (lambda t: {f"{UP}.scale": np.full_like(t[f"{UP}.scale"], np.inf)}, "not finite"),
    "codes of another type": (lambda t: {f"{UP}.codes": t[f"{UP}.codes"].astype(np.int8)}, "int8 of shape"),
    "blocks of another size": (lambda t: {f"{UP}.codes": t[f"{UP}.codes"][..., :16]}, "expected blocks of bytes"),
    "a matrix of another shape": (
        lambda t: {f"{UP}.codes": t[f"{UP}.codes"][:-1], f"{UP}.scale": t[f"{UP}.scale"][:-1]},
        "the configuration says",
    ),
    "codes for a vector": (
        lambda t: {"model.norm.weight.codes": t[f"{UP}.codes"], "model.norm.weight.scale": t[f"{UP}.scale"]},
        "as a vector and as codes",
    ),
    "a vector of another type": (
        lambda t: {"model.norm.weight": t["model.norm.weight"].astype(np.float16)},
        "expected a vector",
    ),
    "a tensor too many": (lambda t: {"model.layers.9.x": t["model.norm.weight"]}, "is not part of"),
    "a missing tensor": (lambda t: {"model.norm.weight": None}, "is missing"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES.keys())
def test_tensors_that_do_not_fit(source: Checkpoint, tmp_path: Path, change: Change, message: str) -> None:
    tensors = tensors_of(source)
    changed = {**tensors, **change(tensors)}
    folder = written(tmp_path / "b", source, {name: array for name, array in changed.items() if array is not None})
    with pytest.raises(BundleError, match=message):
        Checkpoint.open(folder)


def test_a_large_configuration_or_file_is_refused_before_anything_is_read(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = model_settings(replace(source.config, layers=1, ffn=64))
    folder = written(tmp_path / "large", source, config=small)
    endless = {**model_settings(source.config), "num_hidden_layers": 1 << 40}
    written(tmp_path / "endless", source, config=endless)
    monkeypatch.setattr(bundle.Files, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(BundleError, match="expected at most"):
        Checkpoint.open(folder)
    with pytest.raises(BundleError, match="num_hidden_layers"):
        Checkpoint.open(tmp_path / "endless")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "other.safetensors"}, "lists no file"),
        ({"tokenizer": "other"}, "lists no file"),
        ({"config": {"architectures": ["GPT2LMHeadModel"]}}, "architecture is GPT2"),
    ],
)
def test_manifests_that_lie(source: Checkpoint, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Checkpoint.open(written(tmp_path / "b", source, **changes))


def test_a_changed_byte_is_found(source: Checkpoint, tmp_path: Path) -> None:
    path = written(tmp_path / "b", source) / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        Checkpoint.open(tmp_path / "b")


def test_unknown_tensors(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no tensor"):
        Checkpoint.open(written(tmp_path / "b", source)).blocks("nothing")
