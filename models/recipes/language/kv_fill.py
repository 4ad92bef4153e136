"""KV fill: maps from a row to what later layers keep of its token, found in closed form, then distilled.

    rows behind a layer --ridge--> keys and values of each layer behind it
    long texts, their beginnings filled --the layers behind--> what the model says | what it says by itself --KL--> maps

A map with the least error in keys and values is not the one that changes the least in what is said behind them.

Source: KV Prediction (Horton et al., 2024) for the task; the closed form, and what it is distilled on, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.language.packing import packed, unpacked
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, EXACT_LAST, normalised
from isthmus.models.recipes.common.ridge import affine_ridge
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.language.exits import Traces
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.text import LONG_TOKENS

FILL_BITS = 5  # of a weight
RIDGE = 1e-3  # of the mean variance
LEAST_PROMPT, FOLLOWING = 96, 64  # tokens of a text that are read as a prompt; behind it, that are looked at
BATCH, EPOCHS, PEAK_LR = 2, 4, 3e-4


class Maps(nn.Module):
    """Of each layer behind the rows: keys, not rotated yet, then values."""

    def __init__(self, weight_LOH: Tensor, bias_LO: Tensor) -> None:
        super().__init__()
        self.weight_LOH, self.bias_LO = nn.Parameter(weight_LOH), nn.Parameter(bias_LO)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Of `fill.safetensors`."""
        weight_NH = self.weight_LOH.detach().flatten(0, 1).numpy()
        return {**packed(weight_NH, "weight", FILL_BITS), "bias": self.bias_LO.detach().numpy().astype(np.float16)}

    def stored_LOH(self) -> Tensor:
        """Weights as a bundle has them; gradients go to those here."""
        stored_NH = torch.from_numpy(unpacked(self.tensors(), "weight"))
        return self.weight_LOH + (stored_NH.view_as(self.weight_LOH) - self.weight_LOH).detach()


def fit_maps(model: Llama, traces: Traces, depth: int) -> Maps:
    """In closed form; `traces` has the rows of every depth from `depth` to the last layer's own.

    First tokens teach nothing: theirs are not guessed.
    """
    later_N = traces.later_N
    x_NH = normalised(traces.rows[depth][later_N].float())
    found = [
        affine_ridge(x_NH, keys_values(model.layers[index], traces.rows[index][later_N]), RIDGE)
        for index in range(depth, model.config.layers)
    ]
    return Maps(torch.stack([weight_OH for weight_OH, _ in found]), torch.stack([bias_O for _, bias_O in found]))


def keys_values(layer: Layer, rows: Tensor) -> Tensor:
    """Keys, not rotated, then values (.., 2 * kv_heads * head_dim) that a layer makes of its rows."""
    h = layer.norm(rows.to(layer.weight("input_layernorm").dtype), "input_layernorm")
    parts = [h @ layer.weight(f"self_attn.{part}_proj").T for part in ("k", "v")]
    return torch.cat(parts, -1).float()


@dataclass(frozen=True)
class Batch:
    """Long texts of one length, rows behind the maps' layer; from token `exact` on they are left to the layers."""

    x_BTH: Tensor
    last_MH: Tensor  # behind the model's last layer, of those tokens
    exact: int


def batches(traces: Traces, depth: int, last: int, generator: torch.Generator) -> Iterator[Batch]:
    """All texts once, in random order, as prompts of random length."""
    order = torch.randperm(len(traces), generator=generator).tolist()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        spans = [traces.bounds(sequence) for sequence in order[start : start + BATCH]]
        prompt = int(torch.randint(LEAST_PROMPT, LONG_TOKENS - FOLLOWING + 1, (), generator=generator))
        exact, end = prompt - EXACT_LAST, prompt + FOLLOWING
        x_BTH = torch.stack([traces.rows[depth][first : first + end] for first, _ in spans]).float()
        last_MH = torch.cat([traces.rows[last][first + exact : first + end] for first, _ in spans]).float()
        yield Batch(x_BTH, last_MH, exact)


def read(model: Llama, maps: Maps, depth: int, x_BTH: Tensor, exact: int) -> Tensor:
    """Rows (B, T - exact, H) behind the last layer, of tokens from `exact` on.

    Those before are filled, but for the first EXACT_FIRST, which go through the layers too.
    """
    first, (batch, tokens, _) = EXACT_FIRST, x_BTH.shape
    guessed_BNH = normalised(x_BTH[:, first:exact])
    guessed_places = torch.arange(first, exact).expand(batch, -1)
    places_T = torch.cat([torch.arange(first), torch.arange(exact, tokens)])
    seen_TS = torch.arange(tokens) <= places_T[:, None]
    own_BTH = torch.cat([x_BTH[:, :first], x_BTH[:, exact:]], 1)
    for layer, weight_OH, bias_O in zip(list(model.layers)[depth:], maps.stored_LOH(), maps.bias_LO, strict=True):
        q_BTHD, k_BTKD, v_BTKD = layer.project(own_BTH, places_T.expand(batch, -1))
        k_BNKD, v_BNKD = layer.given(guessed_BNH @ weight_OH.T + bias_O, guessed_places)
        keys_BKSD, values_BKSD = (
            torch.cat([own[:, :first], guessed, own[:, first:]], 1).transpose(1, 2)
            for own, guessed in ((k_BTKD, k_BNKD), (v_BTKD, v_BNKD))
        )
        own_BTH = layer.attend(own_BTH, q_BTHD, keys_BKSD, values_BKSD, seen_TS)
    return own_BTH[:, first:]


class Divergence(torch.autograd.Function):
    """KL divergence of what the output head says of rows (M, H) from what it says of the teacher's, mean over rows.

    The gradient is worked out on the way forward, as in HeadLoss.
    """

    @staticmethod
    def forward(ctx: Any, h_MH: Tensor, teacher_MH: Tensor, head_VH: Tensor) -> Tensor:
        own_MV, wanted_MV = (
            F.linear(rows_MH.to(head_VH.dtype), head_VH).float().log_softmax(1) for rows_MH in (h_MH, teacher_MH)
        )
        likely_MV = wanted_MV.exp()
        loss = (likely_MV * (wanted_MV - own_MV)).sum(1).mean()
        gradient_MH = (own_MV.exp_() - likely_MV).to(head_VH.dtype) @ head_VH
        ctx.save_for_backward(gradient_MH.float() / len(h_MH))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradients[0] * gradient_MH, None, None


def train_maps(run: Run, maps: Maps, model: Llama, traces: Traces, depth: int) -> Maps:
    """Distil maps on long texts, their rows at `depth` and behind the last layer; returns the averaged ones."""
    last = model.config.layers

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        found_MH = read(model, maps, depth, batch.x_BTH, batch.exact).flatten(0, 1)
        loss: Tensor = Divergence.apply(  # type: ignore[no-untyped-call]
            model.normed(found_MH), model.normed(batch.last_MH), model.embedding_VH
        )
        return loss, {}

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(traces, depth, last, generator)

    schedule = Schedule(EPOCHS, len(traces) // BATCH, PEAK_LR, warmup_epochs=0.1, weight_decay=0, ema_decay=0.99)
    finished = run.fit(f"fill{depth}", maps, epoch_batches, loss_of, schedule)
    if not isinstance(finished, Maps):
        raise TypeError("fit returned another module")
    return finished
