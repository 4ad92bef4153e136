"""Hugging Face folders that are older, broken or hostile."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LinearScaling, RopeScaling
from isthmus.models.language.checkpoint import huggingface
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.weights import MAX_LAYERS
from tests.bench.tiny_llama import write_tiny_llama
from tests.unit.models.language.checkpoint.comparison import LLAMA3, refuses


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("shared") / "tiny")


def edit(folder: Path, **changes: Any) -> Path:
    """`changes` in config.json; None takes a key out."""
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_older_rope_settings(tiny: Path) -> None:
    scaling = {**LLAMA3, "type": "llama3"}
    config = Checkpoint.open(edit(tiny, rope_theta=500_000, rope_scaling=scaling)).config
    assert config.rope_theta == 500_000.0 and config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture is GPT2LMHeadModel, this program reads LlamaFor"),
        ({"architectures": None}, "architecture is None"),
        ({"architectures": {"a": 1}}, "architecture is"),
        ({"num_hidden_layers": 10**9}, f"num_hidden_layers is 1000000000, expected an integer from 1 to {MAX_LAYERS}"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"tensor model.layers\.1\.\S+ is not part"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"intermediate_size": 96}, r"gate_proj.weight has shape \(128, 64\), the configuration says \(96, 64\)"),
        ({"vocab_size": 300}, r"embed_tokens.weight has shape \(259, 64\)"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 15}, "need it even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is small"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        *(
            ({"rope_scaling": {key: kind, "factor": 4.0}}, f"rope type {kind}, expected default, linear or llama3")
            for key in ("rope_type", "type")
            for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "proportional")
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope type yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e4}}, "differ"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor below"),
        ({"rope_scaling": {**LLAMA3, "factor": float("nan")}}, "factor is nan"),
        ({"rope_parameters": {"full_attention": {}}}, "rope settings"),
        ({"rope_parameters": [1]}, "rope settings"),
        ({"attention_bias": True}, "attention_bias is True, this program supports False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"q_proj.bias is missing"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"q_norm.weight is missing"),
        ({"tie_word_embeddings": False}, r"lm_head.weight is missing"),
        ({"eos_token_id": 259}, "end-of-text id 259"),
        ({"eos_token_id": ["2"]}, "end-of-text id 2"),
    ],
)  # fmt: skip
def test_hostile_configuration(tiny: Path, changes: dict[str, Any], message: str) -> None:
    refuses(edit(tiny, **changes), message)


@pytest.mark.parametrize(
    ("changes", "context"), [({}, 512), ({"sliding_window": 64}, 64), ({"sliding_window": 600}, 512)]
)
def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(
    tiny: Path, changes: dict[str, Any], context: int
) -> None:
    assert Checkpoint.open(edit(tiny, architectures=["MistralForCausalLM"], **changes)).config.context == context


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}, "rope_theta": None},
    ],
)
def test_linear_rope_scaling_in_each_spelling(tiny: Path, changes: dict[str, Any]) -> None:
    config = Checkpoint.open(edit(tiny, **changes)).config
    assert config.rope_scaling == LinearScaling(4.0) and config.rope_theta == 10_000.0


def test_llama3s_original_context_is_the_context_where_none_is_given(tiny: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    assert Checkpoint.open(edit(tiny, rope_scaling=scaling)).config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 512)


def test_a_folder_of_gguf_files_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    refuses(tmp_path, r"a folder of GGUF files, name one of them: a\.gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data(), file=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
def test_any_value_in_a_configuration_opens_or_is_a_bundle_error(shared: Path, data: st.DataObject, file: str) -> None:
    original = (shared / file).read_text()
    content = json.loads(original)
    part = content["model"] if file == "tokenizer.json" and data.draw(st.booleans()) else content
    keys = [*part, "rope_scaling", "rope_parameters", "add_bos_token", "added_tokens_decoder", "decoder"]
    part[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    try:
        (shared / file).write_text(json.dumps(content))
        with contextlib.suppress(BundleError):
            Checkpoint.open(shared)
    finally:
        (shared / file).write_text(original)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json(tiny: Path, name: str, content: bytes) -> None:
    (tiny / name).write_bytes(content)
    refuses(tiny, name)


def test_folder_without_parts(tiny: Path, tmp_path: Path) -> None:
    (tiny / huggingface.WEIGHTS).rename(tiny / "pytorch_model.bin")
    refuses(tiny, "neither model.safetensors nor")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", r"config\.json: no such file")
    refuses(tmp_path / "nowhere", "no such file or folder")
    (tiny / "pytorch_model.bin").rename(tiny / huggingface.WEIGHTS)
    (tiny / "tokenizer.json").unlink()
    refuses(tiny, r"tokenizer\.json: no such file")


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"model.norm.weight": "../x.safetensors"}},
        {"weight_map": {"model.norm.weight": "/etc/x.safetensors"}},
        {"weight_map": {"model.norm.weight": "a/x.safetensors"}},
        {"weight_map": {"model.norm.weight": ".x.safetensors"}},
        {"weight_map": {"model.norm.weight": "x.bin"}},
        {"weight_map": {"model.norm.weight": None}},
        {"weight_map": {"model.norm.weight": "lost.safetensors"}},
        {"weight_map": []},
        {},
    ],
)
def test_hostile_index(tiny: Path, index: dict[str, Any]) -> None:
    (tiny / huggingface.WEIGHTS).unlink()
    (tiny / huggingface.INDEX).write_text(json.dumps(index))
    refuses(tiny, "plain name|weight_map|no such file")


def test_tensor_in_two_shards(tiny: Path) -> None:
    tensors = safetensors.numpy.load_file(tiny / huggingface.WEIGHTS)
    (tiny / huggingface.WEIGHTS).rename(tiny / "a.safetensors")
    safetensors.numpy.save_file({"model.norm.weight": tensors["model.norm.weight"]}, tiny / "b.safetensors")
    places = {"x": "a.safetensors", "y": "b.safetensors"}
    (tiny / huggingface.INDEX).write_text(json.dumps({"weight_map": places}))
    refuses(tiny, r"model\.norm\.weight is in another file too")


def safetensors_file(header: object, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors_file(b"[" * 10_000, b""),
        safetensors_file([], b""),
        safetensors_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_file({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"\0" * 4),
        safetensors_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"\0" * 4),
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 8),
        safetensors_file({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_file({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
        safetensors_file({"a": {"shape": [1]}}, b""),
        safetensors_file({}, b""),
    ],
)
def test_hostile_safetensors(tiny: Path, content: bytes) -> None:
    (tiny / huggingface.WEIGHTS).write_bytes(content)
    refuses(tiny, "model|tensor")
