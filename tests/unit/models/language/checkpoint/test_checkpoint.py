"""Checkpoints against transformers, tensor by tensor, and files that lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.architecture import RopeScaling
from isthmus.models.language.checkpoint import huggingface
from isthmus.models.language.checkpoint.checkpoint import Checkpoint, smollm2_path
from isthmus.models.language.checkpoint.weights import tensor_shapes
from tests.bench.tiny_llama import Kind, write_tiny_llama
from tests.unit.models.language.checkpoint.comparison import LLAMA3, expand, state_dict

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return Checkpoint.open("smollm2")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


# SmolLM2, the file that ships


def test_every_tensor_of_smollm2_equals_transformers(transformers: Any, smollm2: Checkpoint) -> None:
    path = smollm2_path()
    expected = state_dict(transformers, str(path.parent), gguf_file=path.name)
    assert expected.keys() == {*tensor_shapes(smollm2.config), "lm_head.weight"}
    for name, values in expected.items():
        np.testing.assert_allclose(smollm2.tensor(name), values, rtol=0, atol=1e-6, err_msg=name)


def test_smollm2_configuration(smollm2: Checkpoint) -> None:
    config = smollm2.config
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.ffn, config.vocab, config.context, config.rope_theta) == (1536, 49_152, 8192, 100_000.0)
    assert config.tied and not config.qkv_bias and not config.qk_norm and config.rope_scaling is None
    assert config.norm_eps == pytest.approx(1e-5)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_blocks_of_smollm2_are_its_weights(smollm2: Checkpoint, part: str) -> None:
    name = f"model.layers.3.self_attn.{part}.weight"
    blocks = smollm2.blocks(name)
    assert blocks is not None and blocks.codes_NK.max() == 15
    assert (blocks.codes_NK.dtype, blocks.scale_NG.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(expand(blocks), smollm2.tensor(name))


def test_embedding_has_no_4_bit_blocks_and_is_the_output_head(smollm2: Checkpoint) -> None:
    assert smollm2.blocks("lm_head.weight") is None
    np.testing.assert_array_equal(smollm2.tensor("lm_head.weight"), smollm2.tensor("model.embed_tokens.weight"))


def test_fingerprint_of_smollm2_is_golden(smollm2: Checkpoint) -> None:
    assert smollm2.fingerprint.hex() == "839de580404df014cd638944b1031bc35edbede2fe014e738598ee816e75873b"


def test_opens_without_torch_or_transformers() -> None:
    program = (
        "import sys; from isthmus.models.language.checkpoint.checkpoint import Checkpoint; Checkpoint.open('smollm2');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Hugging Face folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_folder_of_ours_equals_transformers(transformers: Any, tmp_path: Path, kind: Kind, tied: bool) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "tiny", kind, tied=tied))
    expected = state_dict(transformers, tmp_path / "tiny")
    assert expected.keys() == {*tensor_shapes(checkpoint.config), "lm_head.weight"}
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values, err_msg=name)


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_folder_of_transformers(transformers: Any, tmp_path: Path, kind: str, dtype: str) -> None:
    """As `save_pretrained` writes it, in several shards with an index."""
    import torch

    tokenizer = write_tiny_llama(tmp_path / "tokenizer")
    shutil.copytree(tokenizer, tmp_path / "model")
    (tmp_path / "model" / huggingface.WEIGHTS).unlink()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    rope = {"rope_theta": 5e5, **({} if kind == "mistral" else LLAMA3)}
    configuration = transformers.AutoConfig.for_model(
        kind, **sizes, num_key_value_heads=2, head_dim=16, vocab_size=259, rope_parameters=rope, sliding_window=None
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert (tmp_path / "model" / huggingface.INDEX).exists()
    assert checkpoint.config.rope_theta == 5e5
    assert checkpoint.config.rope_scaling == (None if kind == "mistral" else RopeScaling(8.0, 1.0, 4.0, 8192))
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values.float().numpy(), err_msg=name)


def test_fingerprint_knows_content_and_not_place(tiny: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny)
    tensors = safetensors.numpy.load_file(tiny / huggingface.WEIGHTS)
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    (moved / huggingface.WEIGHTS).unlink()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if places[n] == file}, moved / file)
    (moved / huggingface.INDEX).write_text(json.dumps({"weight_map": places}))
    assert Checkpoint.open(moved).fingerprint == original.fingerprint
    tensors["model.norm.weight"][3] += 1
    safetensors.numpy.save_file(tensors, moved / huggingface.WEIGHTS)
    assert Checkpoint.open(moved).fingerprint != original.fingerprint
    other = write_tiny_llama(tmp_path / "other", rms_norm_eps=2e-5)
    assert Checkpoint.open(other).fingerprint != original.fingerprint


def test_unknown_tensor_and_values_not_finite(tiny: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no tensor model\.layers\.9"):
        Checkpoint.open(tiny).tensor("model.layers.9.mlp.up_proj.weight")
    tensors = safetensors.numpy.load_file(tiny / huggingface.WEIGHTS)
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, tiny / huggingface.WEIGHTS)
    with pytest.raises(BundleError, match="not finite"):
        Checkpoint.open(tiny).tensor("model.norm.weight")
