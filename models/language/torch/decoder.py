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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.language.architecture import LlamaConfig, rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.layer import Layer, Linear, load_layer
from isthmus.models.torch_device import CPU, upload

WIDTH = 16  # rows of a forward pass; with bfloat16 matrix units up to 32 rows take as long as one
PAGE_TOKENS = 64  # attention reads whole pages, so that its shape depends on the row's own position only
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Layer, rotated queries (N, heads, D), rotated keys and values (N, kv_heads, D) -> mixed values (N, heads * D)
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive rows of a forward pass: tokens of one session from position `start` on."""

    cache: KVCache
    start: int
    count: int


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
        self.config, self.dtype, self.width, self.device = config, dtype, width, embedding_VH.device
        self._layers, self._embedding_VH, self._norm_H, self._head = layers, embedding_VH, norm_H, head
        self._frequencies_D2 = torch.from_numpy(rope_frequencies(config)).to(self.device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.bfloat16,
        width: int = WIDTH,
        device: torch.device = CPU,
    ) -> Decoder:
        """A decoder of all layers, its weights on `device`. Raises BundleError, or torch.OutOfMemoryError."""
        config = checkpoint.config

        def weight(name: str) -> Tensor:
            return torch.from_numpy(checkpoint.tensor(name)).to(device)

        layers = {index: load_layer(config, weight, index, dtype, width) for index in range(config.layers)}
        embedding_VH = weight("model.embed_tokens.weight").to(dtype)
        head = embedding_VH if config.tied else weight("lm_head.weight").to(dtype)
        norm_H = weight("model.norm.weight")
        return cls(config, layers, embedding_VH, norm_H, Linear(head, None, width), dtype, width)

    def __getitem__(self, cut: slice) -> Decoder:
        """A decoder of the layers in `cut`, with shared weights."""
        layers = {index: self._layers[index] for index in list(self._layers)[cut]}
        return Decoder(self.config, layers, self._embedding_VH, self._norm_H, self._head, self.dtype, self.width)

    @property
    def layers(self) -> range:
        """Indices of these layers in the model."""
        indices = list(self._layers)
        return range(indices[0], indices[-1] + 1)

    @property
    def precision(self) -> str:
        """What an answer's bits depend on: the data type, the rows of a forward pass, and CUDA if that computes."""
        name = f"{self.dtype}/{self.width}".removeprefix("torch.")
        return name if self.device.type == "cpu" else f"{name}/{self.device.type}"

    @property
    def far_positions(self) -> Sequence[int]:
        """First positions at which a forward pass runs other kernels than at position 0. Here there are none."""
        return ()

    def new_cache(self) -> KVCache:
        """An empty cache for these layers."""
        return KVCache(self.config, self.layers, self.dtype)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (width, hidden) of at most `width` tokens, padded with token 0."""
        padded = [*ids, *[0] * (self.width - len(ids))]
        return self._embedding_VH[upload(torch.tensor(padded), self.device)].float()

    @torch.inference_mode()
    def forward(self, x_NH: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run these layers on x (width, hidden) and return their output (width, hidden), float32.

        Extends the cache of each span to the span's end. Raises ValueError above the model's context and leaves every
        cache's length unchanged.
        """
        positions = [span.start + row for span in spans for row in range(span.count)]
        rotation = self.rotation(positions)
        for span in spans:
            span.cache.reserve(padded_tokens(span.start + span.count, self.config.context))
        groups = [group for span in spans for group in attention_groups(span, self.config.context)]

        def attend(index: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            row = 0
            for span in spans:
                rows = slice(row, row + span.count)
                span.cache.write(index, span.start, k_NKD[rows], v_NKD[rows])
                row += span.count
            mixed_NA, row = torch.zeros(self.width, self.config.heads * self.config.head_dim, dtype=self.dtype), 0
            for group in groups:
                rows = slice(row, row + group.count)
                mixed_NA[rows] = self._attend(index, group, q_NHD[rows])
                row += group.count
            return mixed_NA

        x_NH = self._run_layers(x_NH, rotation, attend)
        for span in spans:
            span.cache.length = span.start + span.count
        return x_NH

    @torch.inference_mode()
    def logits(self, x_NH: Tensor) -> Tensor:
        """Logits (width, vocab), float32, of the last layer's output."""
        return self._head(self._norm(x_NH, self._norm_H).to(self.dtype)).float()

    def _run_layers(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        for index, layer in self._layers.items():
            q_NHD, k_NKD, v_NKD = self._project(layer, x_NH, *rotation)
            x_NH = x_NH + layer.out(attend(index, q_NHD, k_NKD, v_NKD)).float()
            gate_N, up_N = layer.gate_up(self._norm(x_NH, layer.ffn_norm_H).to(self.dtype)).chunk(2, dim=-1)
            x_NH = x_NH + layer.down(F.silu(gate_N) * up_N).float()
        return x_NH

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
        return self._rotation(upload(padded, self.device))

    def _rotation(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        angles_ND = (positions_N[:, None] * self._frequencies_D2).repeat(1, 2)
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
