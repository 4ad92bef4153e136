"""A student before training: some layers of its teacher, with output matrices that stand in for the missing ones.

    student's stream -> kept layer -> + activations @ down' ~ the teacher's hidden states before the next kept layer

Layer by layer, `down'` is the ridge regression of what is missing from the teacher's hidden states on the activations
of the feed-forward network, which are those of the student itself: errors do not add up. Source: ReplaceMe (Shopkhoev
et al., 2025) for linear maps merged into a layer, here refitted on activations; Shortened LLaMA (Kim et al., 2024) for
students of fewer layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.ridge import ridge
from isthmus.models.recipes.language.llama import Layer, Llama, parameter_name
from isthmus.models.recipes.language.teacher import TeacherOutputs, length_batches

ENDS = 2  # layers that are kept at either end
RIDGE = 1e-2  # of the mean variance
DOWN = parameter_name("mlp.down_proj", "weight")


def kept_layers(influence_L: Sequence[float], count: int) -> list[int]:
    """Indices of `count` layers: the first two and the last two, and of equal groups between them the most influential.

    A model's first layers make an attention sink, and its last ones remove it. Raises InvalidInput for too few or many.
    """
    total = len(influence_L)
    if not 2 * ENDS <= count < total:
        raise InvalidInput(f"a student of {count} layers, expected {2 * ENDS} to {total - 1}")
    groups = count - 2 * ENDS
    starts = [ENDS + index * (total - 2 * ENDS) // max(groups, 1) for index in range(groups)]
    stops = [*starts[1:], total - ENDS]
    inner = [max(range(a, b), key=influence_L.__getitem__) for a, b in zip(starts, stops, strict=False)]
    return [*range(ENDS), *inner, *range(total - ENDS, total)]


def influence(outputs: TeacherOutputs) -> list[float]:
    """How much each layer turns the hidden states (Men et al., "ShortGPT", 2024), from states at all depths."""
    later_N = outputs.later_N
    states = [outputs.states[depth][later_N].float() for depth in range(len(outputs.states))]
    return [1 - float(F.cosine_similarity(a, b, dim=1).mean()) for a, b in itertools.pairwise(states)]


def start(teacher: Llama, retained: Sequence[int], outputs: TeacherOutputs | None) -> Llama:
    """A student in float32 of the layers `retained`, refitted on `outputs` if there are any.

    These have hidden states at the depth of each kept layer but the first, and after the last layer.
    """
    config = replace(teacher.config, layers=len(retained))
    student = Llama(config).requires_grad_(False)
    with torch.no_grad():
        student.embedding_VH.copy_(teacher.embedding_VH)
        student.norm_H.copy_(teacher.norm_H)
        if student.own_head_VH is not None:
            student.own_head_VH.copy_(teacher.head_VH)
        for own, index in zip(student.layers, retained, strict=True):
            own.load_state_dict(teacher.layers[index].state_dict())
    if outputs is not None:
        fit(student, [*retained[1:], teacher.config.layers], outputs)
    return student


@torch.inference_mode()
def fit(student: Llama, depths: Sequence[int], outputs: TeacherOutputs) -> None:
    """Refit each layer's down projection; its output is to be the teacher's hidden state at the depth of that index."""
    batches = list(length_batches(sorted(range(len(outputs)), key=outputs.lengths.__getitem__), outputs.lengths))
    spans = [[outputs.bounds(s) for s in batch] for batch in batches]
    streams = [student.embed(padded([outputs.ids_N[a:b] for a, b in each])) for each in spans]
    for layer, depth in zip(student.layers, depths, strict=True):
        width = student.config.ffn
        gram_II, moment_IO = torch.zeros(width, width), torch.zeros(width, student.config.hidden)
        inside = []
        for each, x_BTH in zip(spans, streams, strict=True):
            x_BTH, active_BTI = before_down(layer, x_BTH)
            inside.append((x_BTH, active_BTI))
            target_BTH = padded([outputs.states[depth][a:b].float() for a, b in each])
            real_BT = padded([torch.arange(b - a) for a, b in each]) > 0  # the first position's states are outliers
            weight_M1 = target_BTH[real_BT].square().mean(1, keepdim=True).rsqrt()
            active_MI = active_BTI[real_BT] * weight_M1
            missing_MO = (target_BTH - x_BTH - F.linear(active_BTI, layer.weight("mlp.down_proj")))[real_BT] * weight_M1
            gram_II += active_MI.T @ active_MI
            moment_IO += active_MI.T @ missing_MO
        change_IO = ridge(gram_II.numpy(), moment_IO.numpy(), RIDGE * float(gram_II.diagonal().mean()))
        layer.get_parameter(DOWN).add_(torch.from_numpy(change_IO).T.float())
        streams = [x_BTH + F.linear(active_BTI, layer.weight("mlp.down_proj")) for x_BTH, active_BTI in inside]


def before_down(layer: Layer, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """The stream after attention, and the activations (B, T, ffn) before the down projection."""
    x_BTH = layer.add_attention(x_BTH, causal_attention(layer, x_BTH))
    return x_BTH, layer.activations(x_BTH)


def causal_attention(layer: Layer, x_BTH: Tensor) -> Tensor:
    """What the heads find (B, T, heads * D). Written out, its gradient is twice as fast on a CPU as the fused one's."""
    config, (batch, tokens, _) = layer.config, x_BTH.shape
    q_BTHD, k_BTKD, v_BTKD = layer.project(x_BTH, torch.arange(tokens).expand(batch, tokens))
    groups = config.heads // config.kv_heads
    q_BKND = q_BTHD.view(batch, tokens, config.kv_heads, groups, config.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BKNT = (q_BKND * config.head_dim**-0.5) @ k_BTKD.permute(0, 2, 3, 1)
    later_TT = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).repeat(groups, 1)
    weights_BKNT = scores_BKNT.masked_fill(later_TT, -torch.inf).softmax(-1)
    mixed_BKND: Tensor = weights_BKNT.to(v_BTKD.dtype) @ v_BTKD.transpose(1, 2)
    return mixed_BKND.view(batch, config.kv_heads, groups, tokens, -1).permute(0, 3, 1, 2, 4).flatten(2)


def padded(parts: Sequence[Tensor]) -> Tensor:
    """(B, longest, ..), padded with zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
