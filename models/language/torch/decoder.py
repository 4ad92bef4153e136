"""A Llama-type decoder that can be cut between any two layers, and whose answers do not depend on the company.

    ids -> embed -> x_NH -> decoder[0:k] -> x_NH -> decoder[k:] -> x_NH -> logits_NV

Every forward pass has the same N = `width` rows; a row is one token of one session, rows without a token are padding.
So each matrix product has one shape whatever is asked, and a row's bits depend on its own session's tokens alone: not
on how many drafts stand beside it, nor on the other sessions of the batch. That makes verification lossless, and
`check_batch_invariance` proves it for the machine at hand before anything is served.

Our own modules, not `transformers`: those have one dense batch with one length, and choose kernels by shape.
Knows nothing about sampling, sessions' owners or files beyond a Checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.errors import ServiceError
from isthmus.models.language.architecture import LlamaConfig, rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.kv_cache import KVCache

WIDTH = 16  # rows of a pass; with bfloat16 matrix units up to 32 cost what one costs
PAGE_TOKENS = 64  # attention of a row reads whole pages: its shape depends on the row's own position alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive rows of a pass: tokens of one session behind the first `start`."""

    cache: KVCache
    start: int
    count: int


class Linear:
    """x_NI -> x_NO, with the weight packed once for `width` rows."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, width: int) -> None:
        self._bias_O = bias_O
        # The packed product is what torch.compile itself emits on a CPU, twice as fast; private, hence the exact pin.
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
    """One decoder layer. Matrices have the compute type, norms float32."""

    input_norm_H: Tensor
    qkv: Linear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    out: Linear
    ffn_norm_H: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Layers [start, stop) of a model; the first also embeds, the last also gives logits."""

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
        """All layers. Raises BundleError."""
        config = checkpoint.config
        layers = {index: load_layer(checkpoint, index, dtype, width) for index in range(config.layers)}
        embedding_VH = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")).to(dtype)
        head = embedding_VH if config.tied else torch.from_numpy(checkpoint.tensor("lm_head.weight")).to(dtype)
        norm_H = torch.from_numpy(checkpoint.tensor("model.norm.weight"))
        return cls(config, layers, embedding_VH, norm_H, Linear(head, None, width), dtype, width)

    def __getitem__(self, cut: slice) -> Decoder:
        """The layers of `cut`, sharing weights."""
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
        """Rows (width, hidden) of at most `width` tokens, padded with token 0."""
        padded = [*ids, *[0] * (self.width - len(ids))]
        return self._embedding_VH[torch.tensor(padded)].float()

    @torch.inference_mode()
    def forward(self, x_NH: Tensor, spans: Sequence[Span]) -> Tensor:
        """Rows behind the last of these layers (width, hidden), float32; each span's cache is extended to its end.

        Raises ValueError above the model's context, with every cache as long as before.
        """
        positions = [span.start + row for span in spans for row in range(span.count)]
        cos_N1D, sin_N1D = self.rotation(positions)
        for span in spans:
            span.cache.reserve(padded_tokens(span.start + span.count, self.config.context))
        groups = [group for span in spans for group in same_shape(span, self.config.context)]
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
        """Logits (width, vocab), float32, of rows behind the last layer."""
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

    def _attend(self, layer: int, group: Group, q_NHD: Tensor) -> Tensor:
        """Attention of rows that read equally many tokens (n, heads * D). Each row is a batch entry of its own."""
        config = self.config
        keys_KTD, values_KTD = group.cache.read(layer, group.tokens)
        shape = (group.count, config.kv_heads, group.tokens, config.head_dim)
        q_NKGD = q_NHD.view(group.count, config.kv_heads, -1, config.head_dim)
        mixed_NKGD = F.scaled_dot_product_attention(
            q_NKGD, keys_KTD.expand(shape), values_KTD.expand(shape), group.mask_N11T, scale=config.head_dim**-0.5
        )
        return mixed_NKGD.reshape(group.count, -1)

    def rotation(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What `rotate` takes for rows at these positions, padded to `width`: two of shape (width, 1, head_dim)."""
        padded = torch.tensor([*positions, *[0] * (self.width - len(positions))], dtype=torch.float32)
        angles_ND = (padded[:, None] * self._frequencies_D2).repeat(1, 2)
        return angles_ND.cos()[:, None], angles_ND.sin()[:, None]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one span that read the same number of whole pages."""

    cache: KVCache
    count: int
    tokens: int
    mask_N11T: Tensor


def padded_tokens(tokens: int, context: int) -> int:
    """`tokens` in whole pages; the last page ends with the context. More than the context stay what they are."""
    return max(tokens, min(-(-tokens // PAGE_TOKENS) * PAGE_TOKENS, context))


def same_shape(span: Span, context: int) -> list[Group]:
    """A span cut where its rows begin to read another page."""
    groups, start, stop = [], span.start, span.start + span.count
    while start < stop:
        tokens = padded_tokens(start + 1, context)
        end = min(stop, tokens)
        allowed_NT = torch.arange(tokens)[None] <= torch.arange(start, end)[:, None]
        groups.append(Group(span.cache, end - start, tokens, allowed_NT[:, None, None]))
        start = end
    return groups


def rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's order: halves, not pairs (Su et al., 2021)."""
    low, high = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_N1D + torch.cat((-high, low), dim=-1) * sin_N1D


def load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype, width: int) -> Layer:
    """One layer's weights; projections that read the same rows are joined."""
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


def check_batch_invariance(decoder: Decoder, tokens: int = PAGE_TOKENS + 12) -> None:
    """Prove on this machine that a row's bits do not depend on its company.

    Raises ServiceError when a token's logits differ between a pass of its own, a block, and a mixed batch.
    """
    generator, tokens = torch.Generator().manual_seed(0), min(tokens, decoder.config.context)
    ids = torch.randint(decoder.config.vocab, (tokens,), generator=generator).tolist()
    alone = run_rows(decoder, ids, [1] * tokens)
    blocks = run_rows(decoder, ids, chunks(tokens, decoder.width))
    uneven = run_rows(decoder, ids, chunks(tokens, max(decoder.width // 2 - 1, 1)), company=ids[::-1])
    if not torch.equal(alone, blocks) or not torch.equal(alone, uneven):
        raise ServiceError("this machine's kernels give a row other bits in other company; lossless needs --width 1")


def chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def run_rows(decoder: Decoder, ids: Sequence[int], counts: Sequence[int], company: Sequence[int] = ()) -> Tensor:
    """Logits (len(ids), vocab) with `counts` tokens a pass, beside one token a pass of another session."""
    cache, other, rows, start = decoder.new_cache(), decoder.new_cache(), [], 0
    for step, count in enumerate(counts):
        beside = list(company[step : step + 1]) if count < decoder.width else []
        spans = [Span(other, step, 1)] if beside else []
        x_NH = decoder.embed([*beside, *ids[start : start + count]])
        x_NH = decoder.forward(x_NH, [*spans, Span(cache, start, count)])
        rows.append(decoder.logits(x_NH)[len(beside) : len(beside) + count])
        start += count
    return torch.cat(rows)
