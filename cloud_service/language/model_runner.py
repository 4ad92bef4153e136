"""What a pass computes, on the compute thread: tokens through the whole model, or hidden states through its end.

    Whole    ids -> embed -> all layers -> logits
    Short    ids -> embed -> the first layers -> KV fill of the others, where no token is decided
    Behind   states -> rows -> the layers behind the cut -> logits, for a token; -> KV fill, where none is decided

A pass is of one kind: the layers differ. Both share weights. Knows nothing about queues, memory or the event loop.
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
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import Floats
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_fill import KVFill
from isthmus.models.messages import Committed, Opening
from isthmus.protos.limits import BUNDLE_ID_BYTES, MAX_STATE_BYTES

FIRST_TOKENS = 64  # whose rows are kept: chats begin with the same one

AnySequence = TokenSequence | HandoffSequence
Part = tuple[AnySequence, int]  # a session's text, and its rows of the pass
Outcome = Committed | IsthmusError | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of each text, `rows` that went through layers (0: no forward pass was due).

    Of all positions, how many were `filled` in behind the cut instead of run.
    """

    outcomes: list[Outcome]
    rows: int
    filled: int = 0


class FullRunner:
    """Passes over all layers, for sessions of tokens."""

    def __init__(self, decoder: Decoder, eos_ids: frozenset[int], handoffs: Sequence[HandoffBundle]) -> None:
        self.decoder, self.empty = decoder, decoder.new_cache()
        self._eos_ids, self._handoffs = eos_ids, sorted(handoffs, key=lambda handoff: handoff.depth)
        self._short: dict[int, PrefixRunner] = {}

    def new_text(self, tokens: Sequence[int], opening: Opening) -> TokenSequence:
        """Raises InvalidInput for layers that cannot be the only ones kept."""
        if opening.prefill_layers:
            self._check_prefill_layers(opening.prefill_layers)
        return TokenSequence(tokens, opening, self._eos_ids, self.decoder.config.context)

    def due(self, text: AnySequence) -> FullRunner | PrefixRunner:
        """What the text's next rows go through."""
        assert isinstance(text, TokenSequence)
        if not text.guesses:
            return self
        if text.prefill_layers not in self._short:
            deepest = [handoff for handoff in self._handoffs if handoff.depth <= text.prefill_layers][-1]
            self._short[text.prefill_layers] = PrefixRunner(deepest, self.decoder, text.prefill_layers)
        return self._short[text.prefill_layers]

    def _check_prefill_layers(self, prefill_layers: int) -> None:
        if not self._handoffs:
            raise InvalidInput(
                f"{prefill_layers} layers of a prompt: no hand-off bundle is held here to guess the others by"
            )
        first, last = self._handoffs[0].depth, self.decoder.config.layers - 1
        if not first <= prefill_layers <= last:
            raise InvalidInput(f"{prefill_layers} layers of a prompt, expected {first} to {last}, or 0 for all")

    def run(self, parts: Sequence[Part]) -> StepResult:
        """One forward pass; what each round committed, if it ended."""
        started_s = time.monotonic()
        ids, spans, decides = [], [], False
        for text, rows in parts:
            assert isinstance(text, TokenSequence) and text.cache is not None
            ids += text.next_ids(rows)
            decides = decides or text.decides(rows)
            spans.append(Span(text.cache, text.cache.length, rows))
        x_NH = self.decoder.forward(self.decoder.embed(ids), spans)
        logits_NV = self.decoder.logits(x_NH).numpy() if decides else None
        seconds, outcomes, row = time.monotonic() - started_s, list[Outcome](), 0
        for text, rows in parts:
            assert isinstance(text, TokenSequence)
            outcomes.append(text.settle(None if logits_NV is None else logits_NV[row : row + rows], rows, seconds))
            row += rows
        return StepResult(outcomes, row)


class PrefixRunner:
    """Passes over the first layers alone, for positions that decide nothing; the later ones' state in closed form."""

    def __init__(self, handoff: HandoffBundle, decoder: Decoder, prefill_layers: int) -> None:
        """`decoder`: the whole model. `prefill_layers`: layers, from the hand-off's depth on."""
        depth = handoff.depth
        self._lower = decoder[:depth]
        self._between = decoder[depth:prefill_layers] if prefill_layers > depth else None
        self._fill = KVFill(*handoff.kv_fill(), decoder[depth:], prefill_layers - depth)

    def run(self, parts: Sequence[Part]) -> StepResult:
        """One forward pass, which ends no round."""
        started_s = time.monotonic()
        ids, spans = [], []
        for text, rows in parts:
            assert isinstance(text, TokenSequence) and text.cache is not None
            ids += text.next_ids(rows)
            spans.append(Span(text.cache, text.cache.length, rows))
        x_NH = self._lower.forward(self._lower.embed(ids), spans)
        if self._between is not None:
            self._between.forward(x_NH, spans)
        row = 0
        for span in spans:
            self._fill.write(span.cache, span.start, x_NH[row : row + span.count])
            row += span.count
        seconds = time.monotonic() - started_s
        for text, rows in parts:
            assert isinstance(text, TokenSequence)
            text.settle(None, rows, seconds)
        return StepResult([None] * len(parts), row, row)


class SuffixRunner:
    """Passes over the layers behind a hand-off's cut, for sessions of hidden states."""

    def __init__(self, handoff: HandoffBundle, decoder: Decoder) -> None:
        """`decoder`: the whole model. Raises BundleError when the fill does not fit it."""
        self.name = handoff.fingerprint[:BUNDLE_ID_BYTES]
        self.decoder = decoder[handoff.depth :]
        self.empty = self.decoder.new_cache()
        self._depth, self._states = handoff.depth, handoff.state_codec
        self._max_state_bytes = min(handoff.manifest.max_state_bytes, MAX_STATE_BYTES)
        self._fill = KVFill(*handoff.kv_fill(), self.decoder)
        self._lower = decoder[: handoff.depth]
        self._first_row = lru_cache(FIRST_TOKENS)(self._make_first_row)

    def new_text(self, tokens: Sequence[int], opening: Opening) -> HandoffSequence:
        """Raises InvalidInput for a rate or a depth that the bundle lacks."""
        if (rate := max(opening.rate, opening.context_rate)) not in self._states.rates:
            last = len(self._states.rates) - 1
            raise InvalidInput(f"rate {rate} does not exist, the hand-off has rates 0 to {last}")
        if opening.prefill_layers not in (0, self._depth):
            raise InvalidInput(f"{opening.prefill_layers} layers kept, the hand-off is behind layer {self._depth}")
        return HandoffSequence(tokens, opening, self._max_state_bytes, self.decoder.config.context)

    def due(self, text: AnySequence) -> SuffixRunner:
        """What the text's next rows go through."""
        return self

    def run(self, parts: Sequence[Part]) -> StepResult:
        """Decode, fill, and a forward pass if any row needs the layers. A bad state fails its own round alone."""
        started_s = time.monotonic()
        outcomes: list[Outcome] = [None] * len(parts)
        taken: list[Taken] = []
        for index, (text, rows) in enumerate(parts):
            assert isinstance(text, HandoffSequence)
            try:
                taken.append(self._take(index, text, rows))
            except IsthmusError as error:
                text.cut()
                outcomes[index] = error
        logits_NV = self._forward(taken)
        seconds, row = time.monotonic() - started_s, 0
        for each in taken:
            row += each.span.count
            logits_V = logits_NV[row - 1] if logits_NV is not None and each.text.decides else None
            outcomes[each.index] = each.text.settle(logits_V, seconds)
        return StepResult(outcomes, row, sum(each.filled for each in taken))

    def _take(self, index: int, text: HandoffSequence, rows: int) -> Taken:
        """Decode a text's next states, and fill with those that decide nothing. Raises what `decode` raises."""
        cache = text.cache
        assert cache is not None
        states, through = text.next_states(rows)
        # One by one: a product's bits depend on how many rows it has.
        rows_MH = torch.cat([self._row(text, cache.length + place, state) for place, state in enumerate(states)])
        filled = len(states) - through
        if filled:
            self._fill.write(cache, cache.length, rows_MH[:filled])
        return Taken(index, text, Span(cache, cache.length, through), rows_MH[filled:], filled)

    def _row(self, text: HandoffSequence, position: int, state: bytes) -> Tensor:
        """The row (1, hidden) of a position. Raises what `decode` raises."""
        if position == 0:
            return self._first_row(text.id_at(0))
        ids = [text.id_at(position - 1), text.id_at(position)]
        embedded_MH = self._lower.embed(ids)[: len(ids)].numpy()
        return torch.from_numpy(self._states.decode([state], embedded_MH, text.rate_at(position)))

    def _make_first_row(self, id_: int) -> Tensor:
        """Of a text's first token, which depends on nothing else; coded, it would lose as much as all others."""
        spans = [Span(self._lower.new_cache(), 0, 1)]
        return self._lower.forward(self._lower.embed([id_]), spans)[:1].clone()

    def _forward(self, taken: Sequence[Taken]) -> Floats | None:
        """Logits (width, vocab), if a row decides a token."""
        spans = [each.span for each in taken if each.span.count]
        if not spans:
            return None
        x_NH = torch.zeros(self.decoder.width, self.decoder.config.hidden)
        x_NH[: sum(span.count for span in spans)] = torch.cat([each.rows_MH for each in taken])
        x_NH = self.decoder.forward(x_NH, spans)
        if not any(each.text.decides for each in taken):
            return None
        logits_NV: Floats = self.decoder.logits(x_NH).numpy()
        return logits_NV


@dataclass(frozen=True, slots=True)
class Taken:
    """A text's part of a pass: rows (span.count, hidden) for the layers, behind `filled` positions."""

    index: int
    text: HandoffSequence
    span: Span
    rows_MH: Tensor
    filled: int
