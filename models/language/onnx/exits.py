"""Early exits of a language model on the device: what the whole model would say, guessed behind some of its layers.

    rows behind a depth -> map, layers, norm -> the model's own head -> logits -> choice
                                         likelihoods of the first two, entropy -> how likely it is the model's

Source: `models.recipes.language.exits`, which trains them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.weights import tensor_shapes
from isthmus.models.language.drafts import shared_length
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.confidence_head import Judge
from isthmus.models.language.onnx.decoder import OnnxDecoder, OnnxLayers
from isthmus.models.language.onnx.graph import Weights, exit_graph
from isthmus.models.language.packing import Floats, matrix, unpacked

LAYER_NAME = re.compile(r"model\.layers\.(\d{1,3})\.")


class ExitWeights:
    """One exit's tensors by the names of Hugging Face, its layers counted from 0; `config` has so many.

    Matrices are stored as what training changed: of the model's last layers, and of a map that changes nothing.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], base: Weights) -> None:
        """Raises BundleError when there are no layers, or more than the model has."""
        found = {int(match[1]) for name in tensors if (match := LAYER_NAME.match(name))}
        if found != set(range(len(found))) or not 0 < len(found) <= base.config.layers:
            raise BundleError(
                f"an exit has layers {sorted(found)}, expected some, at most {base.config.layers}, from 0"
            )
        self.config = replace(base.config, layers=len(found))
        self._tensors, self._base = tensors, base
        self._shapes: dict[str, tuple[int, ...]] = tensor_shapes(self.config)
        hidden = self.config.hidden
        self._shapes |= {"map.weight": (hidden, hidden), "map.bias": (hidden,)}

    def tensor(self, name: str) -> Floats:
        """Raises BundleError when it is missing or of the wrong shape."""
        expected = self._shapes[name]
        found = unpacked(self._tensors, name) if len(expected) == 2 else matrix(self._tensors, name, 1)
        if found.shape != expected:
            raise BundleError(f"tensor {name} has shape {found.shape}, expected {expected}")
        return found + before(self._base, self.config.layers, name) if len(expected) == 2 else found


def before(base: Weights, layers: int, name: str) -> Floats:
    """A matrix of an exit of so many layers as it was before training: the identity, or of the model's last layers."""
    match = LAYER_NAME.match(name)
    if match is None:
        return np.eye(base.config.hidden, dtype=np.float32)
    return base.tensor(f"model.layers.{base.config.layers - layers + int(match[1])}.{name[match.end() :]}")


def exit_layers(weights: ExitWeights, context: int, threads: int) -> OnnxLayers:
    """An exit ready to run: rows behind its depth -> normed rows for the head. Raises BundleError."""
    config = weights.config
    return OnnxLayers(exit_graph(weights, context), config, range(config.layers), context, threads)


class OnnxExit:
    """One exit over one sequence."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], base: Weights, decoder: OnnxDecoder, threads: int) -> None:
        """Raises BundleError."""
        self._layers = exit_layers(ExitWeights(tensors, base), decoder.context, threads)
        self._judge = Judge.of(tensors)
        self._decoder = decoder

    def fork(self, decoder: OnnxDecoder) -> OnnxExit:
        """The same exit over another sequence, that of `decoder`: weights are shared."""
        fork = copy.copy(self)
        fork._layers, fork._decoder = self._layers.fork(), decoder
        return fork

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._layers.length

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        self._layers.length = min(self._layers.length, length)

    def __call__(self, rows_NH: Floats, text: Sequence[int]) -> tuple[Floats, float]:
        """Rows of the tokens that follow -> logits (vocab,) behind the last, and how likely their choice is right.

        `text`: up to and with that one.
        """
        row_H = self._layers.run(rows_NH)[-1]
        logits_V: Floats = self._decoder.logits(row_H[None])[0]
        return logits_V, self._judge(logits_V, text)


@dataclass(frozen=True)
class Choice:
    """An exit's logits (vocab,), how likely their choice is the full model's, and which exit it was, from 0."""

    logits_V: Floats
    likely: float
    exit: int


class ExitingDecoder:
    """A decoder whose parts end at exits; the part behind the last exit is the cloud's. One text at a time."""

    def __init__(self, handoff: HandoffBundle, base: Weights, decoder: OnnxDecoder, threads: int) -> None:
        """`decoder` is that of `base`, cut at `handoff.depths`. Raises BundleError, InvalidInput."""
        if decoder.cuts != handoff.depths:
            raise InvalidInput(f"the decoder is cut at {decoder.cuts}, the exits are at {handoff.depths}")
        self._decoder = decoder
        self._exits = [OnnxExit(handoff.exit(index), base, decoder, threads) for index in range(len(decoder.cuts))]
        self._rows_NH = np.zeros((0, base.config.hidden), np.float32)  # behind the last exit's depth

    def fork(self, decoder: OnnxDecoder) -> ExitingDecoder:
        """The same exits over another sequence, that of `decoder`, which is a fork too: weights are shared."""
        fork = copy.copy(self)
        fork._decoder, fork._exits = decoder, [exit_.fork(decoder) for exit_ in self._exits]
        fork._rows_NH = self._rows_NH[:0]
        return fork

    def choose(self, text: Sequence[int], likely: float) -> Choice:
        """What follows `text`: from the first exit that is at least so likely right, or else from the last.

        Raises InvalidInput when the text is longer than the device's context.
        """
        self._follow(text)
        for index, exit_ in enumerate(self._exits):
            found = Choice(*exit_(self._advance(index), text), index)
            if found.likely >= likely:
                break
        return found

    def hidden_states(self, text: Sequence[int], start: int) -> Floats:
        """Hidden states (N, hidden) at the last exit's depth, of the tokens of `text` from position `start` on."""
        if self._decoder.ids != list(text):
            self._follow(text)
        last = len(self._exits) - 1
        if self._decoder.through(last) < self._decoder.length:
            self._exits[last](self._advance(last), self._decoder.ids)
        return self._rows_NH[start:]

    def _advance(self, index: int) -> Floats:
        rows_NH = self._decoder.advance(index)
        if index == len(self._exits) - 1:
            self._rows_NH = np.concatenate([self._rows_NH, rows_NH])
        return rows_NH

    def _follow(self, text: Sequence[int]) -> None:
        """Keep what is known of `text`, and append the rest. What others ran past the exits is run again."""
        common = min(shared_length(self._decoder.ids, text), len(text) - 1)
        for index, exit_ in enumerate(self._exits):
            if self._decoder.through(index) > exit_.length:
                common = min(common, exit_.length)
        self._decoder.truncate(common)
        for exit_ in self._exits:
            exit_.truncate(common)
        self._rows_NH = self._rows_NH[:common]
        self._decoder.append(text[common:])
