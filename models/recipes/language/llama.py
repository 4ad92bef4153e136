"""A Llama-type decoder for training: differentiable, over batches of sequences, layer by layer.

    ids_BT -> embed -> x_BTH -> layers[0] -> ... -> layers[L - 1] -> x_BTH -> logits_BTV

This decoder is built for throughput, and `language.torch.decoder`, which serves, for batch invariance. In both, hidden
states between layers are float32 for any type of the matrices, so that measurements here hold for serving. Parameters
have Hugging Face's names. Shape legend: B sequences, T tokens, S attended tokens, H hidden, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig, rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.weights import layer_shapes
from isthmus.models.language.torch.decoder import rotate


@dataclass
class LayerCache:
    """Rotated keys and values (B, kv_heads, T, D) of one layer."""

    keys_BKTD: Tensor
    values_BKTD: Tensor


class Layer(nn.Module):
    """One decoder layer over batches of sequences."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        for name, shape in layer_shapes(config).items():
            path, _, leaf = name.rpartition(".")
            self.register_parameter(parameter_name(path, leaf), nn.Parameter(torch.ones(shape)))
        frequencies_F = torch.from_numpy(rope_frequencies(config))
        self.register_buffer("frequencies_F", frequencies_F, persistent=False)

    def forward(
        self, x_BTH: Tensor, cache: LayerCache | None = None, starts_B: Tensor | None = None
    ) -> tuple[Tensor, LayerCache]:
        """Output of the layer and the extended cache. Sequence b starts at token starts_B[b], after padding."""
        batch, tokens, _ = x_BTH.shape
        cached = cache.keys_BKTD.shape[2] if cache else 0
        starts_B = torch.zeros(batch, dtype=torch.int64) if starts_B is None else starts_B
        positions_T = torch.arange(cached, cached + tokens)
        positions_BT = (positions_T - starts_B[:, None]).clamp(min=0)
        q_BTHD, k_BTKD, v_BTKD = self.project(x_BTH, positions_BT)
        k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        if cache:
            k_BKTD = torch.cat([cache.keys_BKTD, k_BKTD], dim=2)
            v_BKTD = torch.cat([cache.values_BKTD, v_BKTD], dim=2)
        columns_S = torch.arange(cached + tokens)
        mask_BTS = (columns_S <= positions_T[:, None]) & (columns_S >= starts_B[:, None, None])
        mask_BTS |= columns_S == positions_T[:, None]  # padding attends to itself, as a softmax over no keys is NaN
        out_BTH = self.attend(x_BTH, q_BTHD, k_BKTD, v_BKTD, mask_BTS[:, None])
        return out_BTH, LayerCache(k_BKTD, v_BKTD)

    def attend(self, x_BTH: Tensor, q_BTHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor) -> Tensor:
        """The output (B, T, H), with attention to the S keys where `mask` (.., T, S) is true."""
        scale = self.config.head_dim**-0.5
        mixed_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), k_BKSD, v_BKSD, mask, scale=scale, enable_gqa=True
        )
        return self.after_attention(x_BTH, mixed_BHTD.transpose(1, 2).flatten(2))

    def after_attention(self, x_BTH: Tensor, mixed_BTO: Tensor) -> Tensor:
        """The output (B, T, H) from the input and what the heads found (B, T, heads * D)."""
        x_BTH = self.add_attention(x_BTH, mixed_BTO)
        return x_BTH + F.linear(self.activations(x_BTH), self.weight("mlp.down_proj")).float()

    def add_attention(self, x_BTH: Tensor, mixed_BTO: Tensor) -> Tensor:
        """The stream (B, T, H) after attention."""
        return x_BTH + F.linear(mixed_BTO, self.weight("self_attn.o_proj")).float()

    def activations(self, x_BTH: Tensor) -> Tensor:
        """Activations (B, T, ffn) of the feed-forward network, before its down projection."""
        h_BTH = self.norm(x_BTH, "post_attention_layernorm")
        gate, up = (F.linear(h_BTH, self.weight(f"mlp.{part}_proj")) for part in ("gate", "up"))
        return F.silu(gate) * up

    def project(self, x_BTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, heads, D), rotated keys and values (B, T, kv_heads, D)."""
        config, h_BTH, found = self.config, self.norm(x_BTH, "input_layernorm"), []
        for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            y = F.linear(h_BTH, self.weight(f"self_attn.{part}_proj"), self.bias(f"self_attn.{part}_proj"))
            found.append(y.view(*y.shape[:-1], heads, config.head_dim))
        q_BTHD, k_BTKD, v_BTKD = found
        if config.qk_norm:
            q_BTHD, k_BTKD = self.norm(q_BTHD, "self_attn.q_norm"), self.norm(k_BTKD, "self_attn.k_norm")
        return self.rotated(q_BTHD, positions_BT), self.rotated(k_BTKD, positions_BT), v_BTKD

    def rotated_pairs(self, pairs_BTO: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (B, T, kv_heads, D) of a KV fill's output (B, T, O): keys unrotated, then values."""
        shape = (*pairs_BTO.shape[:2], 2, self.config.kv_heads, self.config.head_dim)
        k_BTKD, v_BTKD = pairs_BTO.to(self.weight("self_attn.k_proj").dtype).view(shape).unbind(2)
        return self.rotated(k_BTKD, positions_BT), v_BTKD

    def rotated(self, x_BTKD: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys with rotary position embeddings."""
        angles_BTD = (positions_BT[..., None].float() * self.frequencies_F).repeat(1, 1, 2)  # type: ignore[operator]
        cos, sin = angles_BTD.cos()[:, :, None], angles_BTD.sin()[:, :, None]
        return rotate(x_BTKD.float(), cos, sin).to(x_BTKD.dtype)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm, computed in float32 as in the served decoder and returned in the type of the matrices."""
        weight = self.weight(name)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.norm_eps).to(weight.dtype)

    def weight(self, name: str) -> Tensor:
        return self.get_parameter(parameter_name(name, "weight"))

    def bias(self, name: str) -> Tensor | None:
        return self.get_parameter(parameter_name(name, "bias")) if self.config.qkv_bias else None


def parameter_name(path: str, leaf: str) -> str:
    """A tensor's name as a module's parameter, which cannot contain dots."""
    return f"{path}.{leaf}".replace(".", "__")


class Llama(nn.Module):
    """A whole model. Its parameters are frozen."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_VH = nn.Parameter(torch.zeros(config.vocab, config.hidden))
        self.layers: Sequence[Layer] = nn.ModuleList(Layer(config) for _ in range(config.layers))  # type: ignore[assignment]
        self.norm_H = nn.Parameter(torch.ones(config.hidden))
        self.own_head_VH = None if config.tied else nn.Parameter(torch.zeros(config.vocab, config.hidden))

    @property
    def head_VH(self) -> nn.Parameter:
        """The output head: the embedding in a tied model."""
        return self.embedding_VH if self.own_head_VH is None else self.own_head_VH

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> Llama:
        """Raises BundleError."""
        model = cls(checkpoint.config).requires_grad_(False)
        model.embedding_VH.copy_(torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")))
        model.norm_H.copy_(torch.from_numpy(checkpoint.tensor("model.norm.weight")))
        if model.own_head_VH is not None:
            model.own_head_VH.copy_(torch.from_numpy(checkpoint.tensor("lm_head.weight")))
        for index, layer in enumerate(model.layers):
            for name in layer_shapes(checkpoint.config):
                path, _, leaf = name.rpartition(".")
                source = torch.from_numpy(checkpoint.tensor(f"model.layers.{index}.{name}"))
                layer.get_parameter(parameter_name(path, leaf)).copy_(source)
        return model.to(dtype).eval()

    def embed(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.embedding_VH).float()

    def normed(self, x: Tensor) -> Tensor:
        """The last layer's output after the final norm."""
        return F.rms_norm(x, self.norm_H.shape, self.norm_H.float(), self.config.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the last layer's output."""
        return F.linear(self.normed(x).to(self.head_VH.dtype), self.head_VH)
