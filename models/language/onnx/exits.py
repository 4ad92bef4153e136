"""Early exits of a language model on the device: predict the whole model's next token from its lower layers.

    hidden states at a depth -> map, layers, norm -> the model's output head -> logits -> choice
                                                     logits, text -> confidence head -> how likely the choice is right

`models.recipes.language.exits` trains exits.
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
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.onnx.decoder import NOT_KEPT, OnnxDecoder, OnnxLayers
from isthmus.models.language.onnx.graph import GRAPH_VERSION, TensorSource, exit_graph
from isthmus.models.language.packing import Floats, matrix, unpacked
from isthmus.models.onnx_cache import GraphCache, Key

NO_KEY: Key = {}
LAYER_NAME = re.compile(r"model\.layers\.(\d{1,3})\.")


class ExitWeights:
    """One exit's tensors by their Hugging Face names, with layers counted from 0. A `TensorSource`.

    Matrices are stored as differences from their values before training: the model's last layers, and the identity.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], base: TensorSource) -> None:
        """Raises BundleError when there are no layers or more than the model has."""
        found = {int(match[1]) for name in tensors if (match := LAYER_NAME.match(name))}
        if found != set(range(len(found))) or not 0 < len(found) <= base.config.layers:
            raise BundleError(
                f"an exit has layers {sorted(found)}, expected 1 to {base.config.layers} layers, numbered from 0"
            )
        self.config = replace(base.config, layers=len(found))
        self._tensors, self._base = tensors, base
        self._shapes: dict[str, tuple[int, ...]] = tensor_shapes(self.config)
        hidden = self.config.hidden
        self._shapes |= {"map.weight": (hidden, hidden), "map.bias": (hidden,)}

    def tensor(self, name: str) -> Floats:
        """A float32 tensor. Raises BundleError when it is missing or has the wrong shape."""
        expected = self._shapes[name]
        found = unpacked(self._tensors, name) if len(expected) == 2 else matrix(self._tensors, name, 1)
        if found.shape != expected:
            raise BundleError(f"tensor {name} has shape {found.shape}, expected {expected}")
        return found + initial_matrix(self._base, self.config.layers, name) if len(expected) == 2 else found

    def blocks(self, name: str) -> None:
        """Exits are quantised again: their matrices are sums."""
        return None


def initial_matrix(base: TensorSource, layers: int, name: str) -> Floats:
    """A matrix of an exit with `layers` layers before training: the identity, or one of the model's last layers."""
    match = LAYER_NAME.match(name)
    if match is None:
        return np.eye(base.config.hidden, dtype=np.float32)
    return base.tensor(f"model.layers.{base.config.layers - layers + int(match[1])}.{name[match.end() :]}")


def exit_layers(
    weights: ExitWeights, context: int, threads: int, *, graphs: GraphCache = NOT_KEPT, key: Key = NO_KEY
) -> OnnxLayers:
    """An exit's map, layers and norm: hidden states at its depth -> normed hidden states. Raises BundleError.

    `key`: what `graphs` knows the exit by.
    """
    config = weights.config
    key = {**key, "context": context, "version": GRAPH_VERSION}
    session = graphs.open(key, "exit", threads, lambda: exit_graph(weights, context))
    return OnnxLayers(session, config, range(config.layers), context)


class OnnxExit:
    """One exit over one sequence, with its confidence head."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        base: TensorSource,
        decoder: OnnxDecoder,
        threads: int,
        *,
        graphs: GraphCache = NOT_KEPT,
        key: Key = NO_KEY,
    ) -> None:
        """`graphs` knows it by `key`. Raises BundleError."""
        weights = ExitWeights(tensors, base)
        self._layers = exit_layers(weights, decoder.context, threads, graphs=graphs, key=key)
        self._confidence_head = ConfidenceHead.from_tensors(tensors)
        self._decoder = decoder

    def fork(self, decoder: OnnxDecoder) -> OnnxExit:
        """The same exit over another sequence, that of `decoder`: weights are shared."""
        fork = copy.copy(self)
        fork._layers, fork._decoder = self._layers.fork(), decoder
        return fork

    @property
    def flops(self) -> int:
        """Of its layers since it was made."""
        return self._layers.processed.flops

    @property
    def length(self) -> int:
        """Number of tokens processed."""
        return self._layers.length

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        self._layers.length = min(self._layers.length, length)

    def __call__(self, states_NH: Floats, text: Sequence[int]) -> tuple[Floats, float]:
        """Logits (vocab,) after the last token of `text`, and the confidence that their argmax is right.

        `states_NH`: hidden states at the exit's depth of the tokens of `text` that the exit has not processed.
        """
        last_H = self._layers.run(states_NH)[-1]
        logits_V: Floats = self._decoder.logits(last_H[None])[0]
        return logits_V, self._confidence_head(logits_V, text)


@dataclass(frozen=True)
class Choice:
    """An exit's logits (vocab,), the confidence that their argmax is the full model's, and the exit's index from 0."""

    logits_V: Floats
    likely: float
    exit: int


class ExitingDecoder:
    """A decoder cut at its exits, over one text at a time. The part after the last exit runs in the cloud only."""

    def __init__(
        self,
        handoff: HandoffBundle,
        base: TensorSource,
        decoder: OnnxDecoder,
        threads: int,
        *,
        graphs: GraphCache = NOT_KEPT,
    ) -> None:
        """`decoder`: of the model `base`, cut at `handoff.depths`. Raises BundleError, InvalidInput."""
        if decoder.cuts != handoff.depths:
            raise InvalidInput(f"the decoder is cut at {decoder.cuts}, the exits are at {handoff.depths}")
        self._decoder = decoder
        bundle = handoff.fingerprint.hex()
        self._exits = [
            OnnxExit(handoff.exit(exit_), base, decoder, threads, graphs=graphs, key={"bundle": bundle, "exit": exit_})
            for exit_ in range(len(decoder.cuts))
        ]
        self._states_NH = np.zeros((0, base.config.hidden), np.float32)  # at the last exit's depth

    def fork(self, decoder: OnnxDecoder) -> ExitingDecoder:
        """The same exits over another sequence, that of `decoder`, which is a fork too: weights are shared."""
        fork = copy.copy(self)
        fork._decoder, fork._exits = decoder, [exit_.fork(decoder) for exit_ in self._exits]
        fork._states_NH = self._states_NH[:0]
        return fork

    @property
    def flops(self) -> int:
        """Of the exits' layers since they were made, in addition to the decoder's."""
        return sum(exit_.flops for exit_ in self._exits)

    def choose(self, text: Sequence[int], likely: float) -> Choice:
        """The next token after `text`, of the first exit with a confidence of at least `likely`, or else of the last.

        Raises InvalidInput when the text is longer than the device's context.
        """
        self._align(text)
        for index, exit_ in enumerate(self._exits):
            found = Choice(*exit_(self._advance(index), text), index)
            if found.likely >= likely:
                break
        return found

    def hidden_states(self, text: Sequence[int], start: int) -> Floats:
        """Hidden states (N, hidden) at the last exit's depth, of the tokens of `text` from position `start` on."""
        if self._decoder.ids != list(text):
            self._align(text)
        last = len(self._exits) - 1
        if self._decoder.through(last) < self._decoder.length:
            self._exits[last](self._advance(last), self._decoder.ids)
        return self._states_NH[start:]

    def _advance(self, index: int) -> Floats:
        states_NH = self._decoder.advance(index)
        if index == len(self._exits) - 1:
            self._states_NH = np.concatenate([self._states_NH, states_NH])
        return states_NH

    def _align(self, text: Sequence[int]) -> None:
        """Keep the state of the prefix shared with `text` and append the rest.

        Tokens that the decoder processed without the exits, for another caller, are run again.
        """
        common = min(shared_length(self._decoder.ids, text), len(text) - 1)
        for index, exit_ in enumerate(self._exits):
            if self._decoder.through(index) > exit_.length:
                common = min(common, exit_.length)
        self._decoder.truncate(common)
        for exit_ in self._exits:
            exit_.truncate(common)
        self._states_NH = self._states_NH[:common]
        self._decoder.append(text[common:])
