"""A Llama-type decoder that can be cut between any two layers, with batch-invariant results.

    ids -> embed -> x_NH -> decoder[0:k] -> x_NH -> decoder[k:] -> x_NH -> logits_NV

Every forward pass has the same N = `width` rows. A row is one token of one session; unused rows are padding. So each
matrix product has one fixed shape, and a row's bits depend only on the tokens of its own session, not on the number of
drafts in the batch or on other sessions. This makes verification lossless; `batch_invariance` checks it on the machine
at hand before the service starts.

`transformers` is not used because it runs dense batches of one length and its kernels depend on their shape. Knows
nothing about sampling, sessions or files other than a Checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig, rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.kv_cache import KVCache

WIDTH = 16  # rows of a forward pass; with bfloat16 matrix units up to 32 rows take as long as one
PAGE_TOKENS = 64  # attention reads whole pages, so that its shape depends on the row's own position only
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive rows of a forward pass: tokens of one session from position `start` on."""

    cache: KVCache
    start: int
    count: int


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


class Decoder:
    """Consecutive layers of a model, with its embedding and output head."""

    def __init__(
        self,
        config: LlamaConfig,
        layers: dict[int, Layer],
        embedding_VH: Tensor,
        norm_H: Tensor,
        head: Linear,
        dtype: torch.dtype,
        width: int,
    ) -> None:
        self.config, self.dtype, self.width = config, dtype, width
        self._layers, self._embedding_VH, self._norm_H, self._head = layers, embedding_VH, norm_H, head
        self._frequencies_D2 = torch.from_numpy(rope_frequencies(config))

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH) -> Decoder:
        """A decoder of all layers. Raises BundleError."""
        config = checkpoint.config
        layers = {index: load_layer(checkpoint, index, dtype, width) for index in range(config.layers)}
        embedding_VH = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")).to(dtype)
        head = embedding_VH if config.tied else torch.from_numpy(checkpoint.tensor("lm_head.weight")).to(dtype)
        norm_H = torch.from_numpy(checkpoint.tensor("model.norm.weight"))
        return cls(config, layers, embedding_VH, norm_H, Linear(head, None, width), dtype, width)

    def __getitem__(self, cut: slice) -> Decoder:
        """A decoder of the layers in `cut`, with shared weights."""
        layers = {index: self._layers[index] for index in list(self._layers)[cut]}
        return type(self)(self.config, layers, self._embedding_VH, self._norm_H, self._head, self.dtype, self.width)

    @property
    def layers(self) -> range:
        """Indices of these layers in the model."""
        indices = list(self._layers)
        return range(indices[0], indices[-1] + 1)

    def new_cache(self) -> KVCache:
        """An empty cache for these layers."""
        return KVCache(self.config, self.layers, self.dtype)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (width, hidden) of at most `width` tokens, padded with token 0."""
        padded = [*ids, *[0] * (self.width - len(ids))]
        return self._embedding_VH[torch.tensor(padded)].float()

    @torch.inference_mode()
    def forward(self, x_NH: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run these layers on x (width, hidden) and return their output (width, hidden), float32.

        Extends the cache of each span to the span's end. Raises ValueError above the model's context and leaves every
        cache's length unchanged.
        """
        positions = [span.start + row for span in spans for row in range(span.count)]
        cos_N1D, sin_N1D = self.rotation(positions)
        for span in spans:
            span.cache.reserve(padded_tokens(span.start + span.count, self.config.context))
        groups = [group for span in spans for group in attention_groups(span, self.config.context)]
        for index, layer in self._layers.items():
            q_NHD, k_NKD, v_NKD = self._project(layer, x_NH, cos_N1D, sin_N1D)
            mixed_NA = torch.zeros(self.width, self.config.heads * self.config.head_dim, dtype=self.dtype)
            row = 0
            for span in spans:
                rows = slice(row, row + span.count)
                span.cache.write(index, span.start, k_NKD[rows], v_NKD[rows])
                row += span.count
            row = 0
            for group in groups:
                rows = slice(row, row + group.count)
                mixed_NA[rows] = self._attend(index, group, q_NHD[rows])
                row += group.count
            x_NH = x_NH + layer.out(mixed_NA).float()
            gate_N, up_N = layer.gate_up(self._norm(x_NH, layer.ffn_norm_H).to(self.dtype)).chunk(2, dim=-1)
            x_NH = x_NH + layer.down(F.silu(gate_N) * up_N).float()
        for span in spans:
            span.cache.length = span.start + span.count
        return x_NH

    @torch.inference_mode()
    def logits(self, x_NH: Tensor) -> Tensor:
        """Logits (width, vocab), float32, of the last layer's output."""
        return self._head(self._norm(x_NH, self._norm_H).to(self.dtype)).float()

    def _norm(self, x_NH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_NH, weight_H.shape, weight_H, self.config.norm_eps)

    def _project(self, layer: Layer, x_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (N, heads, D), rotated keys and values (N, kv_heads, D)."""
        config = self.config
        sizes = [config.heads, config.kv_heads, config.kv_heads]
        qkv_NXD = layer.qkv(self._norm(x_NH, layer.input_norm_H).to(self.dtype)).view(self.width, -1, config.head_dim)
        q_NHD, k_NKD, v_NKD = torch.split(qkv_NXD, sizes, dim=1)
        q_NHD, k_NKD = q_NHD.float(), k_NKD.float()
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_NHD, k_NKD = self._norm(q_NHD, layer.q_norm_D), self._norm(k_NKD, layer.k_norm_D)
        q_NHD, k_NKD = rotate(q_NHD, cos_N1D, sin_N1D), rotate(k_NKD, cos_N1D, sin_N1D)
        return q_NHD.to(self.dtype), k_NKD.to(self.dtype), v_NKD

    def _attend(self, layer: int, group: AttentionGroup, q_NHD: Tensor) -> Tensor:
        """Attention (n, heads * D) of rows that read the same number of tokens. Each row is its own batch entry."""
        config = self.config
        keys_KTD, values_KTD = group.cache.read(layer, group.tokens)
        shape = (group.count, config.kv_heads, group.tokens, config.head_dim)
        q_NKGD = q_NHD.view(group.count, config.kv_heads, -1, config.head_dim)
        mixed_NKGD = F.scaled_dot_product_attention(
            q_NKGD, keys_KTD.expand(shape), values_KTD.expand(shape), group.mask_N11T, scale=config.head_dim**-0.5
        )
        return mixed_NKGD.reshape(group.count, -1)

    def rotation(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (width, 1, head_dim) for `rotate` at these positions, padded to `width`."""
        padded = torch.tensor([*positions, *[0] * (self.width - len(positions))], dtype=torch.float32)
        angles_ND = (padded[:, None] * self._frequencies_D2).repeat(1, 2)
        return angles_ND.cos()[:, None], angles_ND.sin()[:, None]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Rows of one span that read the same number of pages."""

    cache: KVCache
    count: int
    tokens: int
    mask_N11T: Tensor


def padded_tokens(tokens: int, context: int) -> int:
    """`tokens` rounded up to whole pages, at most to the context. Values above the context are unchanged."""
    return max(tokens, min(-(-tokens // PAGE_TOKENS) * PAGE_TOKENS, context))


def attention_groups(span: Span, context: int) -> list[AttentionGroup]:
    """Cut a span where its rows begin to read another page."""
    groups, start, stop = [], span.start, span.start + span.count
    while start < stop:
        tokens = padded_tokens(start + 1, context)
        end = min(stop, tokens)
        allowed_NT = torch.arange(tokens)[None] <= torch.arange(start, end)[:, None]
        groups.append(AttentionGroup(span.cache, end - start, tokens, allowed_NT[:, None, None]))
        start = end
    return groups


def rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's order, by halves instead of pairs (Su et al., 2021)."""
    low, high = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_N1D + torch.cat((-high, low), dim=-1) * sin_N1D


def load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype, width: int) -> Layer:
    """One layer's weights; projections with the same input are concatenated."""
    config, prefix = checkpoint.config, f"model.layers.{index}."

    def weight(name: str) -> Tensor:
        return torch.from_numpy(checkpoint.tensor(prefix + name))

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
