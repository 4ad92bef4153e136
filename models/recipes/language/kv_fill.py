"""Fit a KV fill: maps from a hidden state to the upper layers' keys and values, in closed form, then distilled.

    hidden states at a depth --ridge--> keys and values of each upper layer
    long texts with a filled prefix --upper layers--> predictions | exact predictions --KL divergence--> maps

Distillation is needed because the maps with the least error in keys and values do not change later predictions least.

Source: KV Prediction (Horton et al., 2024) for the task; the closed form and the distillation objective are ours.
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
from isthmus.models.recipes.language.corpus import LONG_TOKENS
from isthmus.models.recipes.language.llama import Layer, Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs

FILL_BITS = 5  # of a weight
RIDGE = 1e-3  # of the mean variance
MIN_PROMPT, FOLLOWING = 96, 64  # tokens of a text's prompt, and of those after it that count
BATCH, EPOCHS, PEAK_LR = 2, 4, 3e-4


class FillMaps(nn.Module):
    """For each upper layer a linear map to its keys, before rotation, then its values."""

    def __init__(self, weight_LOH: Tensor, bias_LO: Tensor) -> None:
        super().__init__()
        self.weight_LOH, self.bias_LO = nn.Parameter(weight_LOH), nn.Parameter(bias_LO)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of `fill.safetensors`."""
        weight_NH = self.weight_LOH.detach().flatten(0, 1).numpy()
        return {**packed(weight_NH, "weight", FILL_BITS), "bias": self.bias_LO.detach().numpy().astype(np.float16)}

    def stored_LOH(self) -> Tensor:
        """Weights as a bundle stores them, with gradients passed straight through the quantisation."""
        stored_NH = torch.from_numpy(unpacked(self.tensors(), "weight"))
        return self.weight_LOH + (stored_NH.view_as(self.weight_LOH) - self.weight_LOH).detach()


def fit_maps(model: Llama, teacher: TeacherOutputs, depth: int) -> FillMaps:
    """Maps in closed form. `teacher` has hidden states at every depth from `depth` to the last.

    First tokens are excluded, since their keys and values are never approximated.
    """
    later_N = teacher.later_N
    x_NH = normalised(teacher.states[depth][later_N].float())
    fitted = [
        affine_ridge(x_NH, keys_values(model.layers[index], teacher.states[index][later_N]), RIDGE)
        for index in range(depth, model.config.layers)
    ]
    return FillMaps(torch.stack([weight_OH for weight_OH, _ in fitted]), torch.stack([bias_O for _, bias_O in fitted]))


def keys_values(layer: Layer, states: Tensor) -> Tensor:
    """A layer's keys, before rotation, then values (.., 2 * kv_heads * head_dim) for its input."""
    h = layer.norm(states.to(layer.weight("input_layernorm").dtype), "input_layernorm")
    parts = [h @ layer.weight(f"self_attn.{part}_proj").T for part in ("k", "v")]
    return torch.cat(parts, -1).float()


@dataclass(frozen=True)
class Batch:
    """Hidden states of texts of one length at the maps' depth; tokens from `exact` on go through the layers."""

    x_BTH: Tensor
    last_MH: Tensor  # of those tokens, after the model's last layer
    exact: int


def batches(teacher: TeacherOutputs, depth: int, last: int, generator: torch.Generator) -> Iterator[Batch]:
    """All texts once, in random order, with prompts of random length."""
    order = torch.randperm(len(teacher), generator=generator).tolist()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        spans = [teacher.bounds(sequence) for sequence in order[start : start + BATCH]]
        prompt = int(torch.randint(MIN_PROMPT, LONG_TOKENS - FOLLOWING + 1, (), generator=generator))
        exact, end = prompt - EXACT_LAST, prompt + FOLLOWING
        x_BTH = torch.stack([teacher.states[depth][first : first + end] for first, _ in spans]).float()
        last_MH = torch.cat([teacher.states[last][first + exact : first + end] for first, _ in spans]).float()
        yield Batch(x_BTH, last_MH, exact)


def run_filled(model: Llama, maps: FillMaps, depth: int, x_BTH: Tensor, exact: int) -> Tensor:
    """Output (B, T - exact, H) of the last layer for the tokens from `exact` on.

    Earlier tokens are filled, except for the first EXACT_FIRST, which go through the layers too.
    """
    first, (batch, tokens, _) = EXACT_FIRST, x_BTH.shape
    filled_BNH = normalised(x_BTH[:, first:exact])
    filled_positions = torch.arange(first, exact).expand(batch, -1)
    positions_T = torch.cat([torch.arange(first), torch.arange(exact, tokens)])
    mask_TS = torch.arange(tokens) <= positions_T[:, None]
    own_BTH = torch.cat([x_BTH[:, :first], x_BTH[:, exact:]], 1)
    for layer, weight_OH, bias_O in zip(list(model.layers)[depth:], maps.stored_LOH(), maps.bias_LO, strict=True):
        q_BTHD, k_BTKD, v_BTKD = layer.project(own_BTH, positions_T.expand(batch, -1))
        k_BNKD, v_BNKD = layer.rotated_pairs(filled_BNH @ weight_OH.T + bias_O, filled_positions)
        keys_BKSD, values_BKSD = (
            torch.cat([own[:, :first], filled, own[:, first:]], 1).transpose(1, 2)
            for own, filled in ((k_BTKD, k_BNKD), (v_BTKD, v_BNKD))
        )
        own_BTH = layer.attend(own_BTH, q_BTHD, keys_BKSD, values_BKSD, mask_TS)
    return own_BTH[:, first:]


class Divergence(torch.autograd.Function):
    """Mean KL divergence of the output head's predictions for hidden states (M, H) from those for the teacher's.

    The gradient is computed in the forward pass, as in HeadLoss.
    """

    @staticmethod
    def forward(ctx: Any, h_MH: Tensor, teacher_MH: Tensor, head_VH: Tensor) -> Tensor:
        own_MV, target_MV = (
            F.linear(each_MH.to(head_VH.dtype), head_VH).float().log_softmax(1) for each_MH in (h_MH, teacher_MH)
        )
        target_probability_MV = target_MV.exp()
        loss = (target_probability_MV * (target_MV - own_MV)).sum(1).mean()
        gradient_MH = (own_MV.exp_() - target_probability_MV).to(head_VH.dtype) @ head_VH
        ctx.save_for_backward(gradient_MH.float() / len(h_MH))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradients[0] * gradient_MH, None, None


def train_maps(run: Run, maps: FillMaps, model: Llama, teacher: TeacherOutputs, depth: int) -> FillMaps:
    """Distil maps on long texts, with hidden states at `depth` and the last; returns their moving average."""
    last = model.config.layers

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        h_MH = run_filled(model, maps, depth, batch.x_BTH, batch.exact).flatten(0, 1)
        loss: Tensor = Divergence.apply(  # type: ignore[no-untyped-call]
            model.normed(h_MH), model.normed(batch.last_MH), model.embedding_VH
        )
        return loss, {}

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(teacher, depth, last, generator)

    schedule = Schedule(EPOCHS, len(teacher) // BATCH, PEAK_LR, warmup_epochs=0.1, weight_decay=0, ema_decay=0.99)
    finished = run.fit(f"fill{depth}", maps, epoch_batches, loss_of, schedule)
    if not isinstance(finished, FillMaps):
        raise TypeError("fit returned another module")
    return finished
