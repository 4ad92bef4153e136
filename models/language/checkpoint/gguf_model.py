"""A Llama or Qwen model in a GGUF file: its keys as a configuration, its tensors under Hugging Face names and order.

llama.cpp's rotary embedding pairs neighbouring elements where Hugging Face pairs the two halves of a head, so files of
architecture `llama` store the rows of q_proj and k_proj interleaved (`permute` in convert_hf_to_gguf.py); this module
restores the order. Qwen files are not interleaved. Knows nothing about tokens.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LinearScaling, LlamaConfig, RopeScaling, rope_frequencies
from isthmus.models.language.checkpoint import weights
from isthmus.models.language.checkpoint.gguf_file import GgufFile
from isthmus.models.language.checkpoint.weights import Blocks, Shape, positive_integer, positive_number

ARCHITECTURES = ("llama", "qwen2", "qwen3")
Item = TypeVar("Item", np.float32, np.uint8)
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
UNSUPPORTED = {  # features of other models that share the tensors' names, with the value that means none
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.alpha": 0.0,
    "rope.dimension_sections": None,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "use_parallel_residual": False,
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufWeights:
    """The tensors of `file` under Hugging Face names, rows in Hugging Face's order. A `CheckpointWeights`."""

    def __init__(self, file: GgufFile, config: LlamaConfig) -> None:
        self._file = file
        self._names = {hugging_face_name(name): name for name in file.tensors if name != ROPE_FACTORS}
        self.shapes: dict[str, Shape] = {name: file.tensors[stored].shape for name, stored in self._names.items()}
        self._interleaved = {}
        if file.fields["general.architecture"] == "llama":
            self._interleaved = {"q_proj": config.heads, "k_proj": config.kv_heads}

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._in_order(name, self._file.floats(self._names[name]))

    def blocks(self, name: str) -> Blocks | None:
        stored = self._file.tensors[self._names[name]]
        rows = self._in_order(name, self._file.bytes_of(self._names[name]))
        if stored.kind == GGMLQuantizationType.Q4_0:
            return unpack(rows.reshape(len(rows), -1, 18), minimum=False)
        if stored.kind == GGMLQuantizationType.Q4_1:
            return unpack(rows.reshape(len(rows), -1, 20), minimum=True)
        return None

    def stored(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        return self._file.tensors[self._names[name]].kind.name, self._file.bytes_of(self._names[name])

    def _in_order(self, name: str, rows: NDArray[Item]) -> NDArray[Item]:
        heads = self._interleaved.get(name.split(".")[-2])
        return rows if heads is None else rows[hugging_face_rows(len(rows), heads)]


def unpack(blocks_NGB: NDArray[np.uint8], *, minimum: bool) -> Blocks:
    """Unpack blocks of Q4_1 (float16 scale, float16 minimum, 16 bytes) or Q4_0 (no minimum: it is -8 scales).

    The low half of each byte is an element of the block's first 16, the high half one of its second 16.
    """
    head = 4 if minimum else 2
    halves_NGH = np.ascontiguousarray(blocks_NGB[..., :head]).view(np.float16).astype(np.float32)
    packed_NGB = blocks_NGB[..., head:]
    codes_NGK = np.concatenate([packed_NGB & 15, packed_NGB >> 4], axis=-1)
    scale_NG = np.ascontiguousarray(halves_NGH[..., 0])
    minimum_NG = np.ascontiguousarray(halves_NGH[..., 1]) if minimum else scale_NG * np.float32(-8)
    return Blocks(codes_NGK.reshape(len(codes_NGK), -1), scale_NG, minimum_NG)


def hugging_face_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """For each row in Hugging Face's order the index of the stored row, (rows,)."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def hugging_face_name(name: str) -> str:
    """Raises BundleError for a tensor that these models do not have."""
    if name in TOP:
        return TOP[name]
    if name in LONGROPE:
        raise BundleError(f"GGUF file: {name}, rope scaling of type longrope is not supported")
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None or match[2] not in LAYER:
        raise BundleError(f"GGUF file: tensor {name[:100]} is not part of a Llama, Qwen 2 or Qwen 3 model")
    return f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"


def read_config(file: GgufFile) -> LlamaConfig:
    """The configuration in a GGUF header. Raises BundleError naming what is missing, unsupported or out of bounds."""
    architecture = str(file.fields.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise BundleError(f"GGUF file: architecture is {architecture[:40]}, this program reads {supported}")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    tokens = file.fields.get("tokenizer.ggml.tokens")
    hidden = positive_integer(keys, "embedding_length", weights.MAX_HIDDEN)
    heads = positive_integer(keys, "attention.head_count", weights.MAX_HEADS)
    config = LlamaConfig(
        layers=positive_integer(keys, "block_count", weights.MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=positive_integer(keys, "attention.head_count_kv", weights.MAX_HEADS, heads),
        head_dim=positive_integer(keys, "attention.key_length", weights.MAX_HEAD_DIM, hidden // heads),
        ffn=positive_integer(keys, "feed_forward_length", weights.MAX_FFN),
        vocab=positive_integer(
            keys, "vocab_size", weights.MAX_VOCAB, len(tokens) if isinstance(tokens, list) else None
        ),
        context=context_length(keys),
        rope_theta=positive_number(keys, "rope.freq_base", 10_000.0),
        norm_eps=positive_number(keys, "attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
    )
    refuse_unsupported(keys, weights.check_config(config, "GGUF file"))
    return with_scaling(file, keys, config)


def context_length(keys: dict[str, Any]) -> int:
    """Tokens, no more than a sliding window of attention holds: up to there it is full attention."""
    context = positive_integer(keys, "context_length", weights.MAX_CONTEXT)
    if not keys.get("attention.sliding_window"):
        return context
    return min(context, positive_integer(keys, "attention.sliding_window", 1 << 32))


def refuse_unsupported(keys: dict[str, Any], config: LlamaConfig) -> None:
    """Raises BundleError for keys that request features the decoder lacks."""
    if keys.get("expert_count"):
        raise BundleError("GGUF file: a mixture of experts (expert_count), only dense models are supported")
    for key, value in UNSUPPORTED.items():
        if (found := keys.get(key, value)) != value:
            raise BundleError(f"GGUF file: {key} is {str(found)[:40]}, this program supports {value}")
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key, config.head_dim) != config.head_dim:
            raise BundleError(f"GGUF file: {key} is {str(keys[key])[:40]}, expected the head size {config.head_dim}")


def with_scaling(file: GgufFile, keys: dict[str, Any], config: LlamaConfig) -> LlamaConfig:
    """`config` with linear scaling, or with Llama 3's if the file has factors, which must match the published settings.

    Raises BundleError for any other scaling.
    """
    linear = linear_scaling(keys)
    if ROPE_FACTORS not in file.tensors:
        return replace(config, rope_scaling=linear)
    if linear:
        raise BundleError(f"GGUF file: linear rope scaling by {linear.factor} and {ROPE_FACTORS}, expected one of them")
    if (shape := file.tensors[ROPE_FACTORS].shape) != (config.head_dim // 2,):
        raise BundleError(f"GGUF file: {ROPE_FACTORS} has shape {shape}, expected ({config.head_dim // 2},)")
    factors = file.floats(ROPE_FACTORS)
    if not (np.isfinite(factors).all() and (factors >= 1).all()):
        raise BundleError(f"GGUF file: {ROPE_FACTORS} holds values that are not finite or below 1")
    original = positive_integer(keys, "rope.scaling.original_context_length", weights.MAX_CONTEXT, 8192)
    scaling = RopeScaling(float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=original)
    if not np.allclose(factors, llama3_factors(config, scaling), rtol=1e-3):
        raise BundleError(f"GGUF file: {ROPE_FACTORS} are not Llama 3's (low 1, high 4, context {original})")
    return replace(config, rope_scaling=scaling)


def linear_scaling(keys: dict[str, Any]) -> LinearScaling | None:
    """As in llama.cpp, where a factor without a type is linear. Raises BundleError for another type."""
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise BundleError(
            f"GGUF file: rope.scaling.type is {str(kind)[:40]}, expected none, linear or Llama 3's factors"
        )
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if kind == "none" or factor in (0, 1):
        return None
    return LinearScaling(positive_number({"rope.scaling.factor": factor}, "rope.scaling.factor"))


def llama3_factors(config: LlamaConfig, scaling: RopeScaling) -> NDArray[np.float32]:
    """The divisor of each rotary frequency (head_dim / 2,), as convert_hf_to_gguf.py writes it."""
    plain, scaled = (rope_frequencies(replace(config, rope_scaling=choice)) for choice in (None, scaling))
    return np.divide(plain, scaled, dtype=np.float32)
