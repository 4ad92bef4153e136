"""Weights of one decoder layer, and the product with a matrix. Knows nothing about attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig


class Linear:
    """x_NI -> x_NO, with a weight that is packed once for `width` rows."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, width: int) -> None:
        self._bias_O = bias_O
        # torch.compile emits this packed product on CPUs; it is twice as fast, but private, hence the pinned version.
        self._packed = weight_OI.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        pack = partial(torch.ops.mkldnn._reorder_linear_weight, batch_size=width) if self._packed else Tensor.contiguous
        self._weight = pack(weight_OI)

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self._packed:
            y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._weight, self._bias_O, "none", [], "")
            return y_NO
        return F.linear(x_NI, self._weight, self._bias_O)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Matrices have the decoder's data type, norms float32."""

    input_norm_H: Tensor
    qkv: Linear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    out: Linear
    ffn_norm_H: Tensor
    gate_up: Linear
    down: Linear


def load_layer(
    config: LlamaConfig, tensor: Callable[[str], Tensor], index: int, dtype: torch.dtype, width: int
) -> Layer:
    """One layer's weights, from tensors by name; projections with the same input are concatenated."""

    def weight(name: str) -> Tensor:
        return tensor(f"model.layers.{index}.{name}")

    def linear(*names: str, bias: bool = False) -> Linear:
        matrix = torch.cat([weight(name + ".weight") for name in names]).to(dtype)
        vector = torch.cat([weight(name + ".bias") for name in names]).to(dtype) if bias else None
        return Linear(matrix, vector, width)

    return Layer(
        input_norm_H=weight("input_layernorm.weight"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=config.qkv_bias),
        q_norm_D=weight("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm_D=weight("self_attn.k_norm.weight") if config.qk_norm else None,
        out=linear("self_attn.o_proj"),
        ffn_norm_H=weight("post_attention_layernorm.weight"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
