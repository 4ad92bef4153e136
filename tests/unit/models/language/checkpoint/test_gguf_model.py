"""GGUF files: the order of rows and 4-bit blocks, and hostile headers."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LinearScaling, RopeScaling
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.gguf_model import hugging_face_name
from isthmus.models.language.checkpoint.weights import tensor_shapes
from tests.bench.tiny_llama import Kind, write_tiny_gguf, write_tiny_llama
from tests.bench.tiny_sentencepiece import TokenizerFile, tiny_pieces, write_tokenizer
from tests.unit.models.language.checkpoint.comparison import LLAMA3, expand, refuses, state_dict

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_tiny_gguf(folder / "tiny.gguf", write_tiny_llama(folder / "tiny"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrices", ["Q4_0", "Q4_1", "F32", "BF16"])
def test_gguf_is_the_folder_quantised(tmp_path: Path, kind: Kind, matrices: str) -> None:
    """Rows in Hugging Face's order, whether the file interleaves them or not."""
    folder = write_tiny_llama(tmp_path / "tiny", kind, tied=False)
    whole, small = Checkpoint.open(folder), Checkpoint.open(write_tiny_gguf(tmp_path / "a.gguf", folder, matrices))
    assert small.config.norm_eps == pytest.approx(whole.config.norm_eps)
    assert small.tokenizer.vocabulary == whole.tokenizer.vocabulary
    assert small.fingerprint != whole.fingerprint
    for name, shape in tensor_shapes(whole.config).items():
        values = small.tensor(name)
        assert values.shape == shape and values.dtype == np.float32
        stored = "F32" if len(shape) == 1 else "Q8_0" if "layers" not in name else matrices
        qtype = gguf.GGMLQuantizationType[stored]
        expected = gguf.quants.dequantize(gguf.quants.quantize(whole.tensor(name), qtype), qtype)
        np.testing.assert_array_equal(values, expected, err_msg=name)
        if stored in ("Q4_0", "Q4_1"):
            blocks = small.blocks(name)
            assert blocks is not None
            np.testing.assert_array_equal(expand(blocks), expected, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_equals_transformers(transformers: Any, tmp_path: Path, kind: Kind) -> None:
    """Heads of 128: transformers 5.23 does not read a GGUF's key_length, and takes that for Qwen 3."""
    folder = write_tiny_llama(tmp_path / "tiny", kind, tied=False, hidden=256, heads=2, kv_heads=1)
    path = write_tiny_gguf(tmp_path / "a.gguf", folder)
    checkpoint = Checkpoint.open(path)
    expected = state_dict(transformers, str(tmp_path), gguf_file=path.name)
    for name in tensor_shapes(checkpoint.config):
        np.testing.assert_allclose(checkpoint.tensor(name), expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_with_llama_3_scaling(tmp_path: Path, factor: float) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", rope_theta=500_000.0, rope_scaling={**LLAMA3, "factor": factor})
    scaling = Checkpoint.open(write_tiny_gguf(tmp_path / "a.gguf", folder)).config.rope_scaling
    assert scaling == RopeScaling(factor, 1.0, 4.0, 8192) == Checkpoint.open(folder).config.rope_scaling


def test_gguf_with_other_rope_factors(tmp_path: Path) -> None:
    scaling = {**LLAMA3, "low_freq_factor": 2.0}
    refuses(
        write_tiny_gguf(tmp_path / "a.gguf", write_tiny_llama(tmp_path / "tiny", rope_scaling=scaling)), "Llama 3's"
    )


def test_gguf_with_linear_scaling(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", rope_scaling={"type": "linear", "factor": 4.0})
    assert Checkpoint.open(write_tiny_gguf(tmp_path / "a.gguf", folder)).config.rope_scaling == LinearScaling(4.0)


SCALING = "llama.rope.scaling"


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({f"{SCALING}.factor": 4.0}, LinearScaling(4.0)),
        ({"llama.rope.scale_linear": 4.0}, LinearScaling(4.0)),
        ({f"{SCALING}.type": "linear"}, None),
        ({f"{SCALING}.type": "linear", f"{SCALING}.factor": 0.0}, None),
        ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, None),
        ({f"{SCALING}.attn_factor": 1.0, "llama.logit_scale": 0.0}, None),
    ],
)
def test_rope_scaling_of_gguf_is_llama_cpps(
    tmp_path: Path, keys: dict[str, Any], scaling: LinearScaling | None
) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", write_tiny_llama(tmp_path / "tiny"), keys=keys)
    assert Checkpoint.open(path).config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0}, "rope.scaling.type is yarn, expected none, linear"),
        ({f"{SCALING}.type": "longrope"}, "rope.scaling.type is longrope"),
        ({f"{SCALING}.factor": -1.0}, "rope.scaling.factor is -1.0"),
        ({f"{SCALING}.factor": "x"}, "rope.scaling.factor is x"),
        ({f"{SCALING}.attn_factor": 1.2}, r"rope.scaling.attn_factor is 1.2\d*, this program supports 1.0"),
        ({"llama.logit_scale": 8.0}, "logit_scale is 8.0, this program supports 0.0"),
        ({"llama.embedding_scale": 12.0}, "embedding_scale is 12.0"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ],
)
def test_what_a_gguf_asks_for_and_is_not_supported_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    refuses(write_tiny_gguf(tmp_path / "a.gguf", write_tiny_llama(tmp_path / "tiny"), keys=keys), message)


def test_linear_scaling_beside_factors(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", rope_theta=500_000.0, rope_scaling=LLAMA3)
    refuses(write_tiny_gguf(tmp_path / "a.gguf", folder, keys={f"{SCALING}.factor": 2.0}), "expected one of them")


def test_longrope_is_named() -> None:
    with pytest.raises(BundleError, match="longrope"):
        hugging_face_name("rope_factors_long.weight")


@pytest.mark.parametrize(("window", "context"), [(64, 64), (0, 512), (4096, 512)])
def test_sliding_window_of_gguf_ends_the_context(tmp_path: Path, window: int, context: int) -> None:
    keys = {"llama.attention.sliding_window": window}
    path = write_tiny_gguf(tmp_path / "a.gguf", write_tiny_llama(tmp_path / "tiny"), keys=keys)
    assert Checkpoint.open(path).config.context == context


def test_each_part_of_a_split_gguf_is_called_one(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf", write_tiny_llama(tmp_path / "tiny"), part_tensors=8)
    parts = sorted(tmp_path.glob("a-*-of-*.gguf"))
    assert len(parts) >= 3
    for number, part in enumerate(parts, 1):
        refuses(part, f"part {number} of {len(parts)} of a split GGUF file.*llama-gguf-split --merge")


@pytest.mark.parametrize(("name", "split"), [("a-00002-of-00003", True), ("a-00001-of-00001", False)])
def test_a_split_gguf_without_keys_is_known_by_its_name(
    tiny_gguf: Path, tmp_path: Path, name: str, split: bool
) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    if split:
        refuses(path, "one part of a split GGUF file")
    else:
        assert Checkpoint.open(path).name == name


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_llama_2_from_a_folder_and_from_gguf(tmp_path: Path, kind: TokenizerFile) -> None:
    """The device's file and the cloud's folder have one tokenizer."""
    vocab = len(tiny_pieces().tokens)
    folder = write_tokenizer(write_tiny_llama(tmp_path / "tiny", vocab="pieces", tied=False), kind)
    whole, small = Checkpoint.open(folder), Checkpoint.open(write_tiny_gguf(tmp_path / "a.gguf", folder))
    assert whole.config.vocab == small.config.vocab == whole.tokenizer.size == vocab
    assert whole.tokenizer.vocabulary == small.tokenizer.vocabulary
    assert whole.tokenizer.encode("the fox 🎉") == small.tokenizer.encode("the fox 🎉")


def test_sentencepiece_of_gguf_equals_transformers(transformers: Any, tmp_path: Path) -> None:
    """Where a text begins with a space transformers puts no other in front, unlike llama.cpp and SentencePiece."""
    folder = write_tokenizer(write_tiny_llama(tmp_path / "tiny", vocab="pieces", tied=False), "tokenizer.json")
    path = write_tiny_gguf(tmp_path / "a.gguf", folder)
    ours, theirs = (
        Checkpoint.open(path).tokenizer,
        transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    for text in ("The quick brown fox", "hello  world\n\n 世界 🎉 é", "\x00x</s>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ascii(text)


def patched(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    target.write_bytes(data.replace(old, new))
    return target


def number(key: bytes, value: int) -> bytes:
    """A key of a GGUF header with an unsigned 32-bit value."""
    return key + struct.pack("<II", gguf.GGUFValueType.UINT32, value)


def real(key: bytes, value: float) -> bytes:
    return key + struct.pack("<If", gguf.GGUFValueType.FLOAT32, value)


def text(key: bytes, value: bytes) -> bytes:
    return key + struct.pack("<IQ", gguf.GGUFValueType.STRING, len(value)) + value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\3", b"GGML\3", "not a GGUF file"),
        (b"GGUF\3", b"GGUF\1", "GGUF version 1"),
        (b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", "big-endian"),
        (b"llama.block_count", b"llama.block_counx", "block_count is missing"),
        (b"llama.context_length", b"llama.context_lengtx", "context_length is missing"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modex", "model is None"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx", "tokens is missing"),
        (b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typx", "token_type is missing"),
        (text(b"tokenizer.ggml.pre", b"gpt-2"), text(b"tokenizer.ggml.pre", b"gpt-9"), "pre is gpt-9"),
        (text(b"general.architecture", b"llama"), text(b"general.architecture", b"bloom"), "bloom, this program reads"),
        (number(b"llama.block_count", 2), number(b"llama.block_count", 10**9), "block_count is 1000000000"),
        (number(b"llama.block_count", 2), number(b"llama.block_count", 3), r"layers\.2\.\S+ is missing"),
        (number(b"llama.attention.head_count", 4), number(b"llama.attention.head_count", 0), "head_count is 0"),
        (number(b"llama.feed_forward_length", 128), number(b"llama.feed_forward_length", 96), r"has shape \(128, 64\)"),
        (number(b"llama.vocab_size", 259), number(b"llama.vocab_size", 258), "has shape"),
        (number(b"tokenizer.ggml.eos_token_id", 2), number(b"tokenizer.ggml.eos_token_id", 999), "end-of-text id 999"),
        (real(b"llama.rope.freq_base", 1e4), real(b"llama.rope.freq_base", np.nan), "freq_base is nan"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_ux.weight", "ffn_ux.weight is not part of a Llama"),
        (b"output_norm.weight", b"output_norx.weight", "is not part of a Llama"),
    ],
)  # fmt: skip
def test_hostile_gguf(tiny_gguf: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    refuses(patched(tiny_gguf, tmp_path / "a.gguf", old, new), message)


@pytest.mark.parametrize(
    ("at", "message"), [(8, "tensors, more than"), (16, "keys, more than"), (24, "truncated")]
)  # counts of tensors and keys, length of the first key
def test_gguf_with_counts_that_lie(tiny_gguf: Path, tmp_path: Path, at: int, message: str) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[at : at + 8] = struct.pack("<Q", 1 << 60)
    (tmp_path / "a.gguf").write_bytes(data)
    refuses(tmp_path / "a.gguf", message)


def test_gguf_with_an_array_that_lies(tmp_path: Path) -> None:
    key = b"general.tags"
    for element, count in ((gguf.GGUFValueType.UINT8, 1 << 60), (gguf.GGUFValueType.ARRAY, 1 << 60)):
        array = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, element, count)
        data = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + array
        (tmp_path / "a.gguf").write_bytes(data)
        refuses(tmp_path / "a.gguf", "GGUF header")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_a_bundle_error(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[: int(len(data) * share)])
    refuses(tmp_path / "a.gguf", "a.gguf|GGUF")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(at=st.integers(0, 12_000), value=st.binary(min_size=1, max_size=8))
def test_any_change_of_a_header_opens_or_is_a_bundle_error(
    tiny_gguf: Path, tmp_path: Path, at: int, value: bytes
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[at : at + len(value)] = value
    (tmp_path / "a.gguf").write_bytes(data)
    with contextlib.suppress(BundleError):
        Checkpoint.open(tmp_path / "a.gguf")
