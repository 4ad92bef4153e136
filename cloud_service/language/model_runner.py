"""What one step computes, on the compute thread: tokens through all layers or the first, or states through the last.

    FullRunner     ids -> embed -> all layers -> logits
    PrefixRunner   ids -> embed -> first layers -> KV fill of the upper layers, where no token is decided
    SuffixRunner   states -> hidden states -> upper layers -> logits, for a token; -> KV fill, where none is decided

A step has one runner. All runners share the decoder's weights. Knows nothing about queues, memory or the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from isthmus.cloud_service.language.handoff_sequence import HandoffSequence
from isthmus.cloud_service.language.sequence import TokenSequence
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.sampling import Floats
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_fill import KVFill
from isthmus.models.messages import Committed, Opening
from isthmus.models.torch_device import download
from isthmus.protos.limits import BUNDLE_ID_BYTES, MAX_STATE_BYTES

CACHED_FIRST_TOKENS = 64  # whose hidden states are cached: most chats begin with the same token

AnySequence = TokenSequence | HandoffSequence
Part = tuple[AnySequence, int]  # a sequence, and its tokens in the step
Outcome = Committed | IsthmusError | None


@dataclass(frozen=True, slots=True)
class Extent:
    """What a step computed of one sequence: `tokens` from position `start` on, in so many operations."""

    start: int
    tokens: int
    flops: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of each sequence, and `tokens` that ran through layers (0: no forward pass was necessary).

    `filled`: positions whose keys and values in the upper layers were filled in instead of computed. `extents`: of each
    sequence; none where the step failed.
    """

    outcomes: list[Outcome]
    tokens: int
    filled: int = 0
    extents: Sequence[Extent] = ()


class FullRunner:
    """Steps through all layers, for sessions of tokens."""

    def __init__(self, decoder: Decoder, eos_ids: frozenset[int], handoffs: Sequence[HandoffBundle]) -> None:
        """`handoffs`: whose KV fills are used for prompts that skip upper layers."""
        self.decoder, self.empty_cache = decoder, decoder.new_cache()
        self._eos_ids, self._handoffs = eos_ids, sorted(handoffs, key=lambda handoff: handoff.depth)
        self._prefix_runners: dict[int, PrefixRunner] = {}

    def new_sequence(self, tokens: Sequence[int], opening: Opening, chooser: TokenChooser) -> TokenSequence:
        """Raises InvalidInput for `prefill_layers` that no KV fill allows."""
        if opening.prefill_layers:
            self._check_prefill_layers(opening.prefill_layers)
        return TokenSequence(tokens, opening, self._eos_ids, self.decoder.config.context, chooser)

    def next_runner(self, sequence: AnySequence) -> FullRunner | PrefixRunner:
        """The runner of the sequence's next tokens."""
        assert isinstance(sequence, TokenSequence)
        if not sequence.skips_upper_layers:
            return self
        layers = sequence.prefill_layers
        if layers not in self._prefix_runners:
            deepest = [handoff for handoff in self._handoffs if handoff.depth <= layers][-1]
            self._prefix_runners[layers] = PrefixRunner(deepest, self.decoder, layers)
        return self._prefix_runners[layers]

    def run(self, parts: Sequence[Part]) -> StepResult:
        """One forward pass; what each round committed, if it ended. A grammar that fails ends its own round only."""
        started_s = time.monotonic()
        ids, spans = gather(parts)
        needs_logits = any(isinstance(each, TokenSequence) and each.needs_logits(count) for each, count in parts)
        extents = [self._extent(*part) for part in parts]
        x_NH = self.decoder.forward(self.decoder.embed(ids), spans)
        logits_NV = download(self.decoder.logits(x_NH)) if needs_logits else None
        seconds, outcomes, start = time.monotonic() - started_s, list[Outcome](), 0
        for sequence, count in parts:
            assert isinstance(sequence, TokenSequence)
            part_NV = None if logits_NV is None else logits_NV[start : start + count]
            try:
                outcomes.append(sequence.complete_step(part_NV, count, seconds))
            except InvalidInput as error:
                sequence.rewind()
                outcomes.append(error)
            start += count
        return StepResult(outcomes, start, extents=extents)

    def _extent(self, sequence: AnySequence, count: int) -> Extent:
        """Of the next `count` tokens, of which those decide a token that come last in the text or in its draft."""
        assert isinstance(sequence, TokenSequence) and sequence.cache is not None
        start, config = sequence.cache.length, self.decoder.config
        decided = min(max(start + count - len(sequence.tokens) + 1, 0), count)
        return Extent(start, count, decoder_flops(config, start, count, layers=config.layers, decided=decided))

    def _check_prefill_layers(self, layers: int) -> None:
        if not self._handoffs:
            raise InvalidInput(f"{layers} layers of a prompt: no handoff bundle is held here to fill the others by")
        first, last = self._handoffs[0].depth, self.decoder.config.layers - 1
        if not first <= layers <= last:
            raise InvalidInput(f"{layers} layers of a prompt, expected {first} to {last}, or 0 for all")


class PrefixRunner:
    """Steps through the first layers only, for positions that decide nothing; the others' state in closed form."""

    def __init__(self, handoff: HandoffBundle, decoder: Decoder, prefill_layers: int) -> None:
        """`decoder`: the whole model. `prefill_layers`: layers to run, at least the handoff's depth."""
        depth = handoff.depth
        self._lower = decoder[:depth]
        self._between = decoder[depth:prefill_layers] if prefill_layers > depth else None
        self._config, self._layers = decoder.config, prefill_layers
        self._fill = KVFill(*handoff.kv_fill(), decoder[depth:], prefill_layers - depth)

    def run(self, parts: Sequence[Part]) -> StepResult:
        """One forward pass, which ends no round."""
        started_s = time.monotonic()
        ids, spans = gather(parts)
        extents = [self._extent(span) for span in spans]
        x_NH = self._lower.forward(self._lower.embed(ids), spans)
        if self._between is not None:
            self._between.forward(x_NH, spans)
        start = 0
        for span in spans:
            self._fill.write(span.cache, span.start, x_NH[start : start + span.count])
            start += span.count
        seconds = time.monotonic() - started_s
        for sequence, count in parts:
            assert isinstance(sequence, TokenSequence)
            sequence.complete_step(None, count, seconds)
        return StepResult([None] * len(parts), start, start, extents)

    def _extent(self, span: Span) -> Extent:
        config, layers = self._config, self._layers
        flops = decoder_flops(config, span.start, span.count, layers=layers, filled=config.layers - layers)
        return Extent(span.start, span.count, flops)


class SuffixRunner:
    """Steps through the layers after a handoff's cut, for sessions of hidden states."""

    def __init__(self, handoff: HandoffBundle, decoder: Decoder) -> None:
        """`decoder`: the whole model. Raises BundleError when the handoff's KV fill does not fit it."""
        self.name = handoff.fingerprint[:BUNDLE_ID_BYTES]
        self.decoder = decoder[handoff.depth :]
        self.empty_cache = self.decoder.new_cache()
        self._depth, self._states = handoff.depth, handoff.state_codec
        self._max_state_bytes = min(handoff.manifest.max_state_bytes, MAX_STATE_BYTES)
        self._fill = KVFill(*handoff.kv_fill(), self.decoder)
        self._lower = decoder[: handoff.depth]
        self._first_state = lru_cache(CACHED_FIRST_TOKENS)(self._compute_first_state)

    def new_sequence(self, tokens: Sequence[int], opening: Opening, chooser: TokenChooser) -> HandoffSequence:
        """Raises InvalidInput for a rate or a depth that the bundle lacks."""
        if (rate := max(opening.rate, opening.context_rate)) not in self._states.rates:
            last = len(self._states.rates) - 1
            raise InvalidInput(f"rate {rate} does not exist, the handoff has rates 0 to {last}")
        if opening.prefill_layers not in (0, self._depth):
            raise InvalidInput(f"{opening.prefill_layers} prefill layers, the handoff is after layer {self._depth}")
        return HandoffSequence(tokens, opening, self._max_state_bytes, self.decoder.config.context, chooser)

    def next_runner(self, sequence: AnySequence) -> SuffixRunner:
        """The runner of the sequence's next states: always this one."""
        return self

    def run(self, parts: Sequence[Part]) -> StepResult:
        """Decode, fill, and a forward pass if any state needs the layers. A bad state fails its own round only."""
        started_s = time.monotonic()
        outcomes: list[Outcome] = [None] * len(parts)
        extents = [Extent(0, 0, 0)] * len(parts)
        inputs: list[SuffixInput] = []
        for index, (sequence, count) in enumerate(parts):
            assert isinstance(sequence, HandoffSequence)
            try:
                inputs.append(self._prepare(index, sequence, count))
            except IsthmusError as error:
                sequence.rewind()
                outcomes[index] = error
        logits_NV = self._forward(inputs)
        seconds, stop = time.monotonic() - started_s, 0
        for each in inputs:
            stop += each.span.count
            logits_V = logits_NV[stop - 1] if logits_NV is not None and each.sequence.needs_logits else None
            extents[each.index] = self._extent(each, decided=logits_V is not None)
            try:
                outcomes[each.index] = each.sequence.complete_step(logits_V, seconds)
            except InvalidInput as error:
                each.sequence.rewind()
                outcomes[each.index] = error
        return StepResult(outcomes, stop, sum(each.filled for each in inputs), extents)

    def _extent(self, part: SuffixInput, decided: bool) -> Extent:
        """The layers after the cut alone; a first token's hidden state is computed once for all sessions."""
        config, span, start = self.decoder.config, part.span, part.span.start - part.filled
        layers = len(self.decoder.layers)
        flops = decoder_flops(config, start, part.filled, layers=0, filled=layers)
        flops += decoder_flops(config, span.start, span.count, layers=layers, decided=int(decided))
        return Extent(start, part.filled + span.count, flops)

    def _prepare(self, index: int, sequence: HandoffSequence, count: int) -> SuffixInput:
        """Decode a sequence's next states, and fill with those that decide nothing. Raises what `decode` raises."""
        cache = sequence.cache
        assert cache is not None
        states, through = sequence.next_states(count)
        # One by one: a matrix product's bits depend on how many rows it has.
        x_MH = torch.cat([self._decode(sequence, cache.length + place, state) for place, state in enumerate(states)])
        filled = len(states) - through
        if filled:
            self._fill.write(cache, cache.length, x_MH[:filled])
        return SuffixInput(index, sequence, Span(cache, cache.length, through), x_MH[filled:], filled)

    def _decode(self, sequence: HandoffSequence, position: int, state: bytes) -> Tensor:
        """The hidden state (1, hidden) of a position. Raises what `decode` raises."""
        if position == 0:
            return self._first_state(sequence.id_at(0))
        ids = [sequence.id_at(position - 1), sequence.id_at(position)]
        embedded_MH = download(self._lower.embed(ids)[: len(ids)])
        return torch.from_numpy(self._states.decode([state], embedded_MH, sequence.rate_at(position)))

    def _compute_first_state(self, id_: int) -> Tensor:
        """Of the first token, which depends on nothing else: coding it would cost as much quality as all others."""
        spans = [Span(self._lower.new_cache(), 0, 1)]
        state_1H = download(self._lower.forward(self._lower.embed([id_]), spans)[:1])
        return torch.from_numpy(state_1H.copy())

    def _forward(self, inputs: Sequence[SuffixInput]) -> Floats | None:
        """Logits (width, vocab), if a state decides a token."""
        spans = [each.span for each in inputs if each.span.count]
        if not spans:
            return None
        x_NH = torch.zeros(self.decoder.width, self.decoder.config.hidden)
        x_NH[: sum(span.count for span in spans)] = torch.cat([each.x_MH for each in inputs])
        x_NH = self.decoder.forward(x_NH, spans)
        if not any(each.sequence.needs_logits for each in inputs):
            return None
        return download(self.decoder.logits(x_NH))


@dataclass(frozen=True, slots=True)
class SuffixInput:
    """A sequence's part of a step: hidden states (span.count, hidden) for the layers, after `filled` positions."""

    index: int
    sequence: HandoffSequence
    span: Span
    x_MH: Tensor
    filled: int


def gather(parts: Sequence[Part]) -> tuple[list[int], list[Span]]:
    """The token ids of a step, one sequence after another, and where each part goes in its cache."""
    ids, spans = list[int](), list[Span]()
    for sequence, count in parts:
        assert isinstance(sequence, TokenSequence) and sequence.cache is not None
        ids += sequence.next_ids(count)
        spans.append(Span(sequence.cache, sequence.cache.length, count))
    return ids, spans
