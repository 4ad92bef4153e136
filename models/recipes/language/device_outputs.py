"""Run texts as a device runs them: its 8-bit lower layers and exits, and what these predict.

ids -> 8-bit layers -> hidden states at each exit's depth -> exit -> choice, features of its confidence head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import features
from isthmus.models.language.onnx.decoder import OnnxDecoder, OnnxLayers
from isthmus.models.language.onnx.exits import ExitWeights, exit_layers, initial_matrix
from isthmus.models.language.onnx.graph import TensorSource
from isthmus.models.language.packing import Floats, packed
from isthmus.models.recipes.language.exits import Exit
from isthmus.models.recipes.language.suffix import next_logprobs
from isthmus.models.recipes.language.teacher import TeacherOutputs

Tensors = dict[str, NDArray[Any]]
LAYER_BITS, MAP_BITS = 3, 5  # of a stored difference


def exit_tensors(exit_: Exit, base: TensorSource) -> Tensors:
    """An exit as a bundle stores it, without confidence head; matrices as packed differences to `initial_matrix`."""
    tensors: Tensors = {"model.norm.weight": exit_.norm_H.detach().numpy(), "map.bias": exit_.map.bias.detach().numpy()}
    weights: dict[str, Tensor] = {"map.weight": exit_.map.weight}
    for index, layer in enumerate(exit_.layers):
        own = {name.replace("__", "."): each for name, each in layer.named_parameters()}
        weights.update({f"model.layers.{index}.{name}": each for name, each in own.items()})
    for name, weight in weights.items():
        array = weight.detach().float().numpy()
        if array.ndim == 2:
            bits = MAP_BITS if name == "map.weight" else LAYER_BITS
            tensors |= packed(array - initial_matrix(base, len(exit_.layers), name), name, bits)
        else:
            tensors[name] = array
    return tensors


@dataclass(frozen=True)
class DeviceOutputs:
    """What a device computes for N positions of texts, with E exits.

    features_ENF: inputs of each exit's confidence head. right_EN: whether its choice is the full model's. next_EN: its
    log-probability of the token that follows in the text. answer_N: whether that token belongs to an answer.
    teacher: the full model's outputs for the same positions, with the device's hidden states at the last exit's depth.
    """

    features_ENF: Tensor
    right_EN: Tensor
    next_EN: Tensor
    answer_N: Tensor
    teacher: TeacherOutputs

    @classmethod
    def concatenate(cls, parts: Sequence[DeviceOutputs]) -> DeviceOutputs:
        """The positions of all parts."""
        return cls(
            torch.cat([part.features_ENF for part in parts], 1),
            torch.cat([part.right_EN for part in parts], 1),
            torch.cat([part.next_EN for part in parts], 1),
            torch.cat([part.answer_N for part in parts]),
            TeacherOutputs.concatenate([part.teacher for part in parts]),
        )


def features_after(logits_NV: Floats, text: Sequence[int], first: int) -> Tensor:
    """Inputs of a confidence head (N, F), from the logits after each token of a text from position `first` on."""
    rows = [features(logits_V, text[: first + place + 1]) for place, logits_V in enumerate(logits_NV)]
    return torch.from_numpy(np.stack(rows))


def run_device(
    checkpoint: Checkpoint, exits: Mapping[int, Tensors], teacher: TeacherOutputs, sequences: Sequence[int]
) -> DeviceOutputs:
    """Run some sequences of the teacher's through the device's lower layers and exits. `exits`: depth -> tensors."""
    depths, threads = sorted(exits), torch.get_num_threads()
    longest = max(end - start for start, end in map(teacher.bounds, sequences))
    decoder = OnnxDecoder(checkpoint, longest, 8, threads, depths)
    layers = [exit_layers(ExitWeights(exits[depth], checkpoint), longest, threads) for depth in depths]
    parts = [
        run_sequence(decoder, layers, teacher.select(sequence), depths[-1])
        for sequence in track(sequences, "device model")
    ]
    return DeviceOutputs.concatenate(parts)


def run_sequence(
    decoder: OnnxDecoder, exits: Sequence[OnnxLayers], teacher: TeacherOutputs, depth: int
) -> DeviceOutputs:
    """Run one sequence. `depth` is that of the last exit."""
    text = teacher.ids_N.tolist()
    decoder.truncate(0)
    decoder.append(text)
    inputs, right, following = [], [], []
    for index, layers in enumerate(exits):
        layers.length = 0
        states_TH = decoder.advance(index)
        logits_TV = decoder.logits(layers.run(states_TH))
        inputs.append(features_after(logits_TV, text, 0))
        right.append(torch.from_numpy(logits_TV.argmax(1)) == teacher.top_NK[:, 0])
        following.append(next_logprobs(torch.from_numpy(logits_TV), teacher.ids_N))
    own_TH = torch.from_numpy(states_TH)
    own_TH[0] = teacher.states[depth][0].float()  # the cloud computes the first one itself
    positions_T = torch.arange(len(text))
    answer_T = (positions_T >= teacher.answers[0] - 1) & (positions_T < len(text) - 1)
    own = replace(teacher, states={depth: own_TH})
    return DeviceOutputs(torch.stack(inputs), torch.stack(right), torch.stack(following), answer_T, own)
