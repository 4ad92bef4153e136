"""The device's decoder against the cloud's: same weights, fewer bits; rollback; and what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx import decoder as decoder_module
from isthmus.models.language.onnx import graph as onnx_graph
from isthmus.models.language.onnx.decoder import PREFILL_TOKENS, OnnxDecoder
from isthmus.models.language.packing import Floats, quantise4, quantise8
from isthmus.models.language.torch.batch_invariance import chunks, run_tokens
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.onnx_cache import GraphCache
from tests.bench.tiny_llama import write_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tied": False, "kv_heads": 4},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "kv_heads": 1},
    "qwen2": {"kind": "qwen2", "tied": False},
    "qwen3": {"kind": "qwen3", "head_dim": 32},
}
CONTEXT = 200
IDS = np.random.default_rng(0).integers(0, 259, 150).tolist()  # over more than two runs of a prefill


class Rounded:
    """A checkpoint with matrices rounded to `bits` bits, as the graph computes with them."""

    def __init__(self, checkpoint: Checkpoint, bits: int) -> None:
        self.config: LlamaConfig = checkpoint.config
        self._checkpoint, self._bits = checkpoint, bits

    def tensor(self, name: str) -> Floats:
        values = self._checkpoint.tensor(name)
        if values.ndim == 1:
            return values
        if self._bits == 8 or "layers" not in name:  # the embedding and the output head always have 8
            codes_OGB, scale_OG = quantise8(values)
            rounded_OGB = (codes_OGB.astype(np.float32) - 128) * scale_OG[..., None]
        else:
            pairs, scale_OG, zeros = quantise4(values)
            codes_OGB = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scale_OG.shape, 32)
            zero_OG = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : scale_OG.shape[1]]
            rounded_OGB = (codes_OGB.astype(np.float32) - zero_OG[..., None]) * scale_OG[..., None]
        return np.asarray(rounded_OGB.reshape(values.shape), np.float32)


def torch_logits(checkpoint: Checkpoint | Rounded) -> Floats:
    """Logits (150, vocab) of the cloud's decoder in float32."""
    decoder = Decoder.load(cast(Checkpoint, checkpoint), torch.float32)
    return np.asarray(run_tokens(decoder, IDS, chunks(len(IDS), decoder.width)).numpy())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("tiny"), tied=False))


@pytest.fixture(scope="module", params=[8, 4])
def loaded(request: pytest.FixtureRequest, tiny: Checkpoint) -> OnnxDecoder:
    return OnnxDecoder(tiny, CONTEXT, request.param, threads=1)


@pytest.fixture
def decoder(loaded: OnnxDecoder) -> OnnxDecoder:
    loaded.truncate(0)
    return loaded


# Against PyTorch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_graph_computes_with_the_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    """With products in float32 nothing else remains between the two decoders."""
    monkeypatch.setattr(onnx_graph, "INTEGER_PRODUCTS", 1)
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path, seed=5, **MODELS[name]))
    found = OnnxDecoder(checkpoint, CONTEXT, bits, threads=1).extend_all(IDS)
    np.testing.assert_allclose(found, torch_logits(Rounded(checkpoint, bits)), rtol=0, atol=1e-3)
    assert np.abs(found - torch_logits(checkpoint)).max() > 0.05  # so 1e-3 can tell these weights from the originals


@pytest.mark.parametrize("name", MODELS)
def test_8_bits_are_close(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path, seed=5, **MODELS[name]))
    found, expected = OnnxDecoder(checkpoint, CONTEXT, threads=1).extend_all(IDS), torch_logits(checkpoint)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() < expected.std()
    assert np.abs(found - expected).mean() < 0.06 * expected.std()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.997


def test_4_bits_are_worse_but_alike(tiny: Checkpoint) -> None:
    """Weights of a normal distribution, which 16 steps suit badly; trained ones are kinder."""
    found, expected = OnnxDecoder(tiny, CONTEXT, 4, threads=1).extend_all(IDS), torch_logits(tiny)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8
    assert np.abs(found - expected).mean() < 0.5 * expected.std()


# One sequence


@pytest.mark.parametrize("cuts", [(PREFILL_TOKENS,), (100,), (1, 2, 3), (PREFILL_TOKENS - 1, 2 * PREFILL_TOKENS + 1)])
def test_prefill_in_parts_equals_all_at_once(decoder: OnnxDecoder, cuts: tuple[int, ...]) -> None:
    whole = decoder.extend_all(IDS)
    decoder.truncate(0)
    edges = [0, *cuts, len(IDS)]
    parts = [decoder.extend_all(IDS[start:stop]) for start, stop in itertools.pairwise(edges)]
    assert decoder.length == len(IDS)
    off = np.abs(np.concatenate(parts) - whole)
    assert np.median(off.max(1)) < 1e-4  # a sum in another order may round an activation to another of 256 steps
    assert off.max() < 0.2 * whole.std()


def test_one_by_one_equals_a_block(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in float32; with 8-bit activations see above."""
    monkeypatch.setattr(onnx_graph, "INTEGER_PRODUCTS", 1)
    decoder = OnnxDecoder(tiny, CONTEXT, threads=1)
    whole = decoder.extend_all(IDS)
    decoder.truncate(0)
    np.testing.assert_allclose(np.stack([decoder.extend([id]) for id in IDS]), whole, rtol=0, atol=2e-4)


def test_extend_gives_the_last_row(decoder: OnnxDecoder) -> None:
    whole = decoder.extend_all(IDS[:70])
    decoder.truncate(0)
    last_V = decoder.extend(IDS[:70])
    assert last_V.shape == (decoder.vocab,) and decoder.length == 70
    assert np.array_equal(last_V, whole[-1])


def test_rollback_is_exact(decoder: OnnxDecoder) -> None:
    """Also over the edge of a run, and to the very beginning."""
    never = [decoder.extend_all(IDS[:60]), decoder.extend_all(IDS[60:80])]
    for wrong in (IDS[:5], IDS[:120]):
        decoder.truncate(60)
        forgotten = decoder.extend_all(wrong)
        assert not np.array_equal(forgotten[:5], never[1][:5])
        decoder.truncate(60)
        assert np.array_equal(decoder.extend_all(IDS[60:80]), never[1])
    decoder.truncate(0)
    assert np.array_equal(decoder.extend_all(IDS[:60]), never[0])


def test_earlier_logits_are_the_callers_own(decoder: OnnxDecoder) -> None:
    first_V = decoder.extend(IDS[:3])
    kept_V = first_V.copy()
    decoder.extend(IDS[3:9])
    assert np.array_equal(first_V, kept_V)


def test_two_decoders_share_nothing(tiny: Checkpoint, decoder: OnnxDecoder) -> None:
    other = OnnxDecoder(tiny, 20, 8, threads=1)
    alone = [decoder.extend_all(IDS[:10]), decoder.extend_all(IDS[10:20])]
    decoder.truncate(0)
    beside = [decoder.extend_all(IDS[:10])]
    other.extend_all(IDS[20:40])
    beside.append(decoder.extend_all(IDS[10:20]))
    assert np.array_equal(np.stack(alone), np.stack(beside)) and (decoder.length, other.length) == (20, 20)


def test_all_of_the_context(tiny: Checkpoint) -> None:
    assert OnnxDecoder(tiny, 1 << 30, threads=1).context == tiny.config.context
    decoder, long = (OnnxDecoder(tiny, context, threads=1) for context in (70, CONTEXT))
    assert np.array_equal(decoder.extend_all(IDS[:70]), long.extend_all(IDS[:70]))
    with pytest.raises(InvalidInput, match="71 tokens, the device holds at most 70"):
        decoder.extend([1])


# Refusals


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens"),
        ([1] * (CONTEXT - 9), "201 tokens, the device holds at most 200"),
        ([1] * (CONTEXT + 1), "211 tokens"),
        ([1, 259], "token 259 .*outside the vocabulary of 259"),
        ([-1, 3], "token 3 or -1 is outside"),
        ([1 << 70], "outside"),
    ],
)
def test_tokens_that_do_not_fit(decoder: OnnxDecoder, ids: list[int], message: str) -> None:
    expected = decoder.extend_all(IDS[:12])
    decoder.truncate(10)
    for call in (decoder.extend, decoder.extend_all):
        with pytest.raises(InvalidInput, match=message):
            call(ids)
        assert decoder.length == 10
    np.testing.assert_allclose(decoder.extend_all(IDS[10:12]), expected[10:], rtol=0, atol=0.2)


@pytest.mark.parametrize("length", [-1, 6])
def test_no_rollback_into_the_future(decoder: OnnxDecoder, length: int) -> None:
    decoder.extend(IDS[:5])
    with pytest.raises(ValueError, match=f"cannot roll back to {length} of 5 tokens"):
        decoder.truncate(length)
    assert decoder.length == 5


@pytest.mark.parametrize("bits", [0, 5, 16, -8])
def test_other_bits(tiny: Checkpoint, bits: int) -> None:
    with pytest.raises(InvalidInput, match=f"weights of {bits} bits, expected 4 or 8"):
        OnnxDecoder(tiny, CONTEXT, bits)


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_heads_of_multiples_of_16(tmp_path: Path, head_dim: int) -> None:
    decoder = OnnxDecoder(Checkpoint.open(write_tiny_llama(tmp_path, head_dim=head_dim)), 8, threads=1)
    assert np.isfinite(decoder.extend([1, 2])).all()


@pytest.mark.parametrize("settings", [{"heads": 16, "head_dim": 24}, {"ffn": 72}])
def test_models_that_the_runtime_does_not_take(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="head size is 24|72 columns"):
        OnnxDecoder(Checkpoint.open(write_tiny_llama(tmp_path, **settings)), CONTEXT)


@pytest.mark.parametrize("length", [2, 20, PREFILL_TOKENS, PREFILL_TOKENS + 1, 150])
def test_a_cached_prefix_changes_no_bit_of_what_follows(tiny: Checkpoint, length: int) -> None:
    """Or the same prompt twice would not have the same answer."""
    decoder = OnnxDecoder(tiny, CONTEXT, threads=1)
    first_V = decoder.extend(IDS[:length])
    decoder.truncate(length - 1)
    np.testing.assert_array_equal(decoder.extend(IDS[length - 1 : length]), first_V)


def test_a_fork_has_a_text_of_its_own(tiny: Checkpoint) -> None:
    decoder = OnnxDecoder(tiny, CONTEXT, threads=1)
    first_V = decoder.extend(IDS[:20])
    fork = decoder.fork()
    assert fork.length == 0 and decoder.length == 20
    apart_V = fork.extend(IDS[50:80])
    alone = OnnxDecoder(tiny, CONTEXT, threads=1)
    alone.extend(IDS[:20])
    np.testing.assert_array_equal(decoder.extend(IDS[20:21]), alone.extend(IDS[20:21]))
    decoder.truncate(0)
    np.testing.assert_allclose(decoder.extend(IDS[50:80]), apart_V, atol=1e-5)
    fork.truncate(0)
    np.testing.assert_allclose(fork.extend(IDS[:20]), first_V, atol=1e-5)


def test_runs_without_torch() -> None:
    program = (
        "import sys, os; import isthmus.models.language.onnx.decoder;"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1';"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Caches of 8 bits


@pytest.fixture(scope="module")
def loaded_int8(tiny: Checkpoint) -> OnnxDecoder:
    return OnnxDecoder(tiny, CONTEXT, threads=1, kv_bits=8)


@pytest.fixture
def int8(loaded_int8: OnnxDecoder) -> OnnxDecoder:
    loaded_int8.truncate(0)
    return loaded_int8


def cache_bytes(decoder: OnnxDecoder) -> int:
    return sum(cache.numpy().nbytes for part in decoder._parts for cache in part._caches)


@pytest.mark.parametrize("name", MODELS)
def test_8_bit_caches_are_close(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path, seed=5, **MODELS[name]))
    exact, int8 = (OnnxDecoder(checkpoint, CONTEXT, threads=1, kv_bits=bits) for bits in (32, 8))
    expected, found = exact.extend_all(IDS), int8.extend_all(IDS)
    assert 4 * cache_bytes(int8) == cache_bytes(exact)
    assert 0 < np.abs(found - expected).mean() < 0.05 * expected.std()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.998


def test_8_bit_caches_roll_back_exactly(int8: OnnxDecoder) -> None:
    never = [int8.extend_all(IDS[:60]), int8.extend_all(IDS[60:80])]
    for wrong in (IDS[:5], IDS[:120]):
        int8.truncate(60)
        int8.extend_all(wrong)
        int8.truncate(60)
        assert np.array_equal(int8.extend_all(IDS[60:80]), never[1])
    int8.truncate(0)
    assert np.array_equal(int8.extend_all(IDS[:60]), never[0])


@pytest.mark.parametrize("length", [2, 20, PREFILL_TOKENS, PREFILL_TOKENS + 1, 150])
def test_a_cached_prefix_changes_no_bit_with_8_bit_caches(int8: OnnxDecoder, length: int) -> None:
    first_V = int8.extend(IDS[:length])
    int8.truncate(length - 1)
    np.testing.assert_array_equal(int8.extend(IDS[length - 1 : length]), first_V)


def test_a_fork_with_8_bit_caches_has_a_text_of_its_own(int8: OnnxDecoder) -> None:
    alone_V = int8.extend(IDS[:20])
    fork = int8.fork()
    fork.extend(IDS[50:80])
    assert cache_bytes(fork) == cache_bytes(int8)
    fork.truncate(0)
    np.testing.assert_array_equal(fork.extend(IDS[:20]), alone_V)
    int8.truncate(19)
    np.testing.assert_array_equal(int8.extend(IDS[19:20]), alone_V)


def test_8_bit_caches_of_a_cut_decoder(tiny: Checkpoint, int8: OnnxDecoder) -> None:
    """Each part is measured on the output of the parts before it, which are empty again afterwards."""
    cut = OnnxDecoder(tiny, CONTEXT, threads=1, cuts=(1,), kv_bits=8)
    assert [cut.through(part) for part in (0, 1)] == [0, 0]
    whole = int8.extend_all(IDS)
    assert np.abs(cut.extend_all(IDS) - whole).mean() < 0.05 * whole.std()


def test_values_above_the_scale_saturate(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "HEADROOM", 0.01)
    found = OnnxDecoder(tiny, CONTEXT, threads=1, kv_bits=8)
    assert np.isfinite(found.extend_all(IDS)).all()
    codes = np.concatenate([c.numpy()[:, :, : len(IDS)].ravel() for part in found._parts for c in part._caches])
    assert codes.max() == 127 and codes.min() >= -128


# Kept graphs


@pytest.mark.parametrize("kv_bits", [8, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_kept_graphs_have_the_same_bits(
    tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, bits: int, kv_bits: int
) -> None:
    """The second start builds nothing, and the weights that it reads are those of that checkpoint."""
    built = OnnxDecoder(tiny, CONTEXT, bits, 1, (1,), kv_bits=kv_bits).extend_all(IDS)
    graphs = GraphCache(tmp_path)
    saved = OnnxDecoder(tiny, CONTEXT, bits, 1, (1,), kv_bits=kv_bits, graphs=graphs).extend_all(IDS)
    assert len(list(tmp_path.iterdir())) == 4  # the embedding, two parts, the head
    monkeypatch.setattr(Checkpoint, "tensor", None)
    kept = OnnxDecoder(tiny, CONTEXT, bits, 1, (1,), kv_bits=kv_bits, graphs=graphs).extend_all(IDS)
    np.testing.assert_array_equal(saved, built)
    np.testing.assert_array_equal(kept, built)


def test_other_settings_have_graphs_of_their_own(tmp_path: Path, tiny: Checkpoint) -> None:
    graphs = GraphCache(tmp_path / "graphs")
    other = Checkpoint.open(write_tiny_llama(tmp_path / "other", seed=4, tied=False))
    OnnxDecoder(tiny, CONTEXT, threads=1, graphs=graphs)
    for added, changed in enumerate(({"context": 100}, {"bits": 4}, {"kv_bits": 8}, {"cuts": (1,)})):
        OnnxDecoder(tiny, **{"context": CONTEXT, **changed}, threads=1, graphs=graphs)  # type: ignore[arg-type]
        assert len(list(graphs.folder.iterdir())) == 4 + added + (added == 3)  # type: ignore[union-attr]
    found = OnnxDecoder(other, CONTEXT, threads=1, graphs=graphs).extend(IDS)
    np.testing.assert_array_equal(found, OnnxDecoder(other, CONTEXT, threads=1).extend(IDS))
