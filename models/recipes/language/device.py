"""What the device itself makes of texts: its 8-bit lower layers and exits, as they will run there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import evidence
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitWeights, before, exit_layers
from isthmus.models.language.onnx.graph import TensorSource
from isthmus.models.language.packing import Floats, packed
from isthmus.models.recipes.language.evaluate import next_logprobs
from isthmus.models.recipes.language.exits import Exit, Traces

Tensors = dict[str, NDArray[Any]]
LAYER_BITS, MAP_BITS = 3, 5  # of what training changed


def exit_tensors(exit_: Exit, base: TensorSource) -> Tensors:
    """As they are stored: what training changed of matrices, in a few bits; without a judge."""
    found: Tensors = {"model.norm.weight": exit_.norm_H.detach().numpy(), "map.bias": exit_.map.bias.detach().numpy()}
    matrices: dict[str, Tensor] = {"map.weight": exit_.map.weight}
    for index, layer in enumerate(exit_.layers):
        own = {name.replace("__", "."): each for name, each in layer.named_parameters()}
        matrices.update({f"model.layers.{index}.{name}": each for name, each in own.items()})
    for name, weight in matrices.items():
        array = weight.detach().float().numpy()
        bits = MAP_BITS if name == "map.weight" else LAYER_BITS
        found |= packed(array - before(base, len(exit_.layers), name), name, bits) if array.ndim == 2 else {name: array}
    return found


@dataclass(frozen=True)
class Observed:
    """N positions of texts: what each exit's judge sees, whether its choice was the model's, the rows to be completed.

    next: log-probability of the token that follows in the text. decides: whether that is one of an answer.
    traces: of the same positions, with the device's rows.
    """

    seen_ENF: Tensor
    right_EN: Tensor
    next_EN: Tensor
    decides_N: Tensor
    traces: Traces


def seen_behind(logits_NV: Floats, text: Sequence[int], first: int) -> Tensor:
    """What a judge sees (N, F) of logits behind the tokens of a text from position `first` on."""
    rows = [evidence(logits_V, text[: first + place + 1]) for place, logits_V in enumerate(logits_NV)]
    return torch.from_numpy(np.stack(rows))


def observe(checkpoint: Checkpoint, exits: Mapping[int, Tensors], traces: Traces, sequences: Sequence[int]) -> Observed:
    """Run some sequences through the device's lower layers and exits. `exits`: depth -> tensors."""
    depths = sorted(exits)
    longest = max(end - start for start, end in map(traces.bounds, sequences))
    decoder = OnnxDecoder(checkpoint, longest, 8, torch.get_num_threads(), depths)
    layers = [exit_layers(ExitWeights(exits[depth], checkpoint), longest, torch.get_num_threads()) for depth in depths]
    seen: list[list[Tensor]] = [[] for _ in depths]
    right: list[list[Tensor]] = [[] for _ in depths]
    following: list[list[Tensor]] = [[] for _ in depths]
    rows, decides, ends, answers = [], [], [0], []
    for sequence in track(sequences, "as the device runs it"):
        start, end = traces.bounds(sequence)
        decoder.truncate(0)
        text = traces.ids_N[start:end].tolist()
        decoder.append(text)
        for index, layer in enumerate(layers):
            layer.length = 0
            behind_NH = decoder.advance(index)
            guess_NH = layer.run(behind_NH)
            logits_NV = decoder.logits(guess_NH)
            seen[index].append(seen_behind(logits_NV, text, 0))
            right[index].append(torch.from_numpy(logits_NV.argmax(1)) == traces.top_NK[start:end, 0])
            following[index].append(next_logprobs(torch.from_numpy(logits_NV), traces.ids_N[start:end]))
        own_NH = torch.from_numpy(behind_NH)
        own_NH[0] = traces.rows[depths[-1]][start].float()  # the cloud makes the first itself
        rows.append(own_NH)
        positions_N = torch.arange(start, end)
        decides.append((positions_N >= traces.answers[sequence] - 1) & (positions_N < end - 1))
        ends.append(ends[-1] + end - start)
        answers.append(ends[-2] + traces.answers[sequence] - start)
    places_N = torch.cat([torch.arange(*traces.bounds(sequence)) for sequence in sequences])
    own = Traces(
        {depths[-1]: torch.cat(rows)},
        traces.top_NK[places_N],
        traces.logprobs_NK[places_N],
        traces.ids_N[places_N],
        tuple(ends[1:]),
        tuple(answers),
    )
    return Observed(
        torch.stack([torch.cat(each) for each in seen]),
        torch.stack([torch.cat(each) for each in right]),
        torch.stack([torch.cat(each) for each in following]),
        torch.cat(decides),
        own,
    )
