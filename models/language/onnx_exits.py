"""Early exits of a language model on the device: what the whole model would say, guessed behind some of its layers.

    rows behind a depth -> map, one layer, norm -> the model's own head -> logits -> choice
                                             likelihoods of the first two, entropy -> how likely it is the model's

Source: `models.recipes.language_exits`, which trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, InvalidInput
from models.language.drafts import shared_length
from models.language.handoff import Handoff
from models.language.onnx_decoder import OnnxDecoder, OnnxLayers
from models.language.onnx_graph import Weights, exit_graph
from models.language.packing import Floats, matrix, unpacked
from models.language.weights import layer_shapes


class ExitWeights:
    """One exit's tensors by the names of Hugging Face, its layer as number 0.

    Matrices are stored as what training changed: of the layer that it began as, and of a map that changes nothing.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], base: Weights) -> None:
        self.config = base.config
        self._tensors, self._base = tensors, base

    def tensor(self, name: str) -> Floats:
        """Raises BundleError when it is missing or of the wrong shape."""
        name = name.removeprefix("model.layers.0.")
        if f"{name}.codes" in self._tensors:
            found = unpacked(self._tensors, name)
            found = found + before(self._base, name) if found.shape == self._shape(name) else found
        else:
            found = matrix(self._tensors, name, 1)
        if found.shape != (expected := self._shape(name)):
            raise BundleError(f"tensor {name} has shape {found.shape}, expected {expected}")
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        hidden = self.config.hidden
        others = {"map.weight": (hidden, hidden), "map.bias": (hidden,), "model.norm.weight": (hidden,)}
        return {**layer_shapes(self.config), **others}[name]


def before(base: Weights, name: str) -> Floats:
    """A matrix of an exit as it was before training: the identity, or the last layer's."""
    if name == "map.weight":
        return np.eye(base.config.hidden, dtype=np.float32)
    return base.tensor(f"model.layers.{base.config.layers - 1}.{name}")


EVIDENCE = 3  # values


@dataclass(frozen=True)
class Judge:
    """How likely an exit's choice is the full model's: one hidden layer over what `evidence` gives."""

    first_FE: Floats
    first_F: Floats
    second_F: Floats
    second: float

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Judge:
        """Raises BundleError."""
        first_FE, first_F = matrix(tensors, "judge.0.weight", 2), matrix(tensors, "judge.0.bias", 1)
        second_1F, second_1 = matrix(tensors, "judge.2.weight", 2), matrix(tensors, "judge.2.bias", 1)
        if (
            first_FE.shape != (len(first_F), EVIDENCE)
            or second_1F.shape != (1, *first_F.shape)
            or second_1.shape != (1,)
        ):
            raise BundleError("the tensors of judge do not fit each other")
        return cls(first_FE, first_F, second_1F[0], float(second_1[0]))

    def __call__(self, logits_V: Floats) -> float:
        hidden_F = np.maximum(self.first_FE @ evidence(logits_V) + self.first_F, 0)
        return float(1 / (1 + np.exp(-(self.second_F @ hidden_F + self.second))))


def evidence(logits_V: Floats) -> Floats:
    """What an exit's judge looks at (EVIDENCE,): the log-probabilities of its two likeliest tokens, and the entropy.

    Not its row: that taught judges the texts they were trained on, and on others they were worse than the softmax.
    """
    second, first = np.partition(logits_V, -2)[-2:]
    weights_V = np.exp(logits_V - first)
    total = weights_V.sum()
    log_total = float(np.log(total))
    entropy = log_total - float((weights_V * (logits_V - first)).sum() / total)
    return np.array([-log_total, second - first - log_total, entropy], np.float32)


class OnnxExit:
    """One exit over one sequence."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], base: Weights, decoder: OnnxDecoder, threads: int) -> None:
        """Raises BundleError."""
        graph = exit_graph(ExitWeights(tensors, base), decoder.context)
        self._layer = OnnxLayers(graph, base.config, range(1), decoder.context, threads)
        self._judge = Judge.of(tensors)
        self._decoder = decoder

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._layer.length

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        self._layer.length = min(self._layer.length, length)

    def __call__(self, rows_NH: Floats) -> tuple[Floats, float]:
        """Rows of the tokens that follow -> logits (vocab,) behind the last, and how likely their choice is right."""
        row_H = self._layer.run(rows_NH)[-1]
        logits_V: Floats = self._decoder.logits(row_H[None])[0]
        return logits_V, self._judge(logits_V)


@dataclass(frozen=True)
class Choice:
    """An exit's logits (vocab,), how likely their choice is the full model's, and which exit it was, from 0."""

    logits_V: Floats
    likely: float
    exit: int


class ExitingDecoder:
    """A decoder whose parts end at exits; the part behind the last exit is the cloud's. One text at a time."""

    def __init__(self, handoff: Handoff, base: Weights, decoder: OnnxDecoder, threads: int) -> None:
        """`decoder` is that of `base`, cut at `handoff.depths`. Raises BundleError, InvalidInput."""
        if decoder.cuts != handoff.depths:
            raise InvalidInput(f"the decoder is cut at {decoder.cuts}, the exits are at {handoff.depths}")
        self._decoder = decoder
        self._exits = [OnnxExit(handoff.exit(index), base, decoder, threads) for index in range(len(decoder.cuts))]
        self._rows_NH = np.zeros((0, base.config.hidden), np.float32)  # behind the last exit's depth

    def choose(self, text: Sequence[int], likely: float) -> Choice:
        """What follows `text`: from the first exit that is at least so likely right, or else from the last.

        Raises InvalidInput when the text is longer than the device's context.
        """
        self._follow(text)
        for index, exit_ in enumerate(self._exits):
            found = Choice(*exit_(self._advance(index)), index)
            if found.likely >= likely:
                break
        return found

    def rows(self, start: int) -> Floats:
        """Rows behind the last exit's depth (N, hidden), of all tokens from position `start` on."""
        last = len(self._exits) - 1
        if self._decoder.through(last) < self._decoder.length:
            self._exits[last](self._advance(last))
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
