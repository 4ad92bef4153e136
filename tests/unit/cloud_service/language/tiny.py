"""Devices and an engine over a real, tiny decoder, whose steps and memory a test can observe."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.native import LanguageEngine
from isthmus.cloud_service.language.metrics import EngineMetricFamilies, EngineMetrics
from isthmus.cloud_service.language.session import EventQueue, Session
from isthmus.models.errors import IsthmusError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import Floats, choose
from isthmus.models.language.torch.batch_invariance import chunks
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder, Span
from isthmus.models.messages import GREEDY, Committed, Opening, Round, Sampling
from isthmus.protos.wire_session import checksum
from tests.bench.tiny_llama import write_tiny_llama

WIDTH, CONTEXT = 8, 256
ENDS = {0, 2}  # <|endoftext|> and <|im_end|>
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=11)


def plain(decoder: Decoder, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """`prompt` and `count` tokens, decoded alone and one by one; fewer after an end of text."""
    tokens, cache = list(prompt), decoder.new_cache()
    for position in range(len(prompt) + count - 1):
        x_NH = decoder.forward(decoder.embed([tokens[position]]), [Span(cache, position, 1)])
        if position + 1 == len(tokens):
            tokens.append(choose(decoder.logits(x_NH)[0].numpy(), sampling, position + 1))
            if tokens[-1] in ENDS:
                break
    return tokens


class InstrumentedDecoder:
    """A decoder that counts its forward passes, can be blocked or fail, and calls `look` after each forward pass."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.gate = threading.Event()
        self.gate.set()
        self.inside = False
        self.failure: Exception | None = None
        self.rows: list[int] = []  # of each forward pass
        self.depths: list[int] = []  # index of its first layer
        self.look: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def __getitem__(self, cut: slice) -> Any:
        return InstrumentedPart(self, self._decoder[cut])

    def forward(self, x_NH: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        return self.observe(self._decoder, x_NH, spans)

    def observe(self, decoder: Decoder, x_NH: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        self.inside = True
        self.gate.wait(10)
        self.inside = False
        self.rows.append(sum(span.count for span in spans))
        self.depths.append(decoder.layers.start)
        x_NH = decoder.forward(x_NH, spans)
        if self.failure is not None:
            raise self.failure  # when the caches have grown already
        self.look()
        return x_NH


class InstrumentedPart:
    """Some layers of an instrumented decoder; their forward passes are counted with the others."""

    def __init__(self, whole: InstrumentedDecoder, decoder: Decoder) -> None:
        self._whole, self._decoder = whole, decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def __getitem__(self, cut: slice) -> Any:
        return InstrumentedPart(self._whole, self._decoder[cut])

    def forward(self, x_NH: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        return self._whole.observe(self._decoder, x_NH, spans)


class EngineHarness:
    """An engine, its instrumented decoder and its metrics; the memory is measured after each forward pass."""

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, pages: int, handoffs: Sequence[HandoffBundle] = ()
    ) -> None:
        self.decoder, self.registry = InstrumentedDecoder(decoder), CollectorRegistry()
        self.budget_bytes = decoder.new_cache().bytes_for(PAGE_TOKENS) * pages
        self.most_bytes = 0
        self.decoder.look = self.look
        metrics = EngineMetrics(EngineMetricFamilies(self.registry), "tiny")
        instrumented: Any = self.decoder
        self.queue = ByteBudget(64 << 20)
        self.engine = LanguageEngine(checkpoint, instrumented, self.budget_bytes, metrics, handoffs, queue=self.queue)

    def look(self) -> None:
        caches = [session.sequence.cache for session in self.engine._sessions]
        self.most_bytes = max(self.most_bytes, sum(cache.bytes for cache in caches if cache is not None))

    def count(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"isthmus_cloud_{name}", {"model": "tiny", **labels})
        assert value is not None
        return value


Play = Callable[[EngineHarness], Awaitable[None]]
Scenario = Callable[..., EngineHarness]


class Device:
    """One device: its tokens, and the queue that its stream would read."""

    def __init__(
        self,
        harness: EngineHarness,
        name: int,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        prefill_layers: int = 0,
        peer: str = "",
    ) -> None:
        self.prefill_layers, self.peer = prefill_layers, peer
        self.engine, self.name, self.sampling = harness.engine, name.to_bytes(16, "big"), sampling
        self.tokens = list(prompt)
        self.events = EventQueue()
        self.session: Session | None = None
        self.last = Committed(0)

    async def open(self, start: int = 0, crc32: int | None = None, logprobs: int | None = None) -> None:
        crc32 = checksum(self.tokens) if crc32 is None else crc32
        tokens = tuple(self.tokens[start:])
        model = self.engine.info.fingerprint[:8]
        opening = Opening(
            model, self.name, start, tokens, crc32, self.sampling, logprobs, prefill_layers=self.prefill_layers
        )
        self.session = await self.engine.open(opening, self.events, self.peer)

    def send(self, draft: Sequence[int] = (), extend: int = 0) -> None:
        assert self.session is not None
        self.engine.add(self.session, Round(len(self.tokens), tuple(draft), extend))

    async def receive(self, draft: Sequence[int] = ()) -> Committed:
        answer = await asyncio.wait_for(self.events.get(), 30)
        if isinstance(answer, IsthmusError):
            raise answer
        assert answer is not None
        if answer.accepted or answer.tokens:
            self.tokens[answer.base :] = [*draft[: answer.accepted], *answer.tokens]
        return answer

    async def ask(self, draft: Sequence[int] = (), extend: int = 0) -> Committed:
        self.send(draft, extend)
        return await self.receive(draft)

    def leave(self) -> None:
        assert self.session is not None
        self.engine.leave(self.session)

    async def write(self, expected: Sequence[int], rng: np.random.Generator) -> None:
        """Reach `expected` with drafts that are right in part."""
        while len(self.tokens) < len(expected):
            right = expected[len(self.tokens) : len(self.tokens) + int(rng.integers(0, 12))]
            await self.ask([id_ if rng.random() < 0.8 else int(rng.integers(0, 259)) for id_ in right])


def head_rows(decoder: Decoder, depth: int, tokens: Sequence[int]) -> Floats:
    """What a device sends states of: hidden states (N, hidden) after the first `depth` layers."""
    head, rows, start = decoder[:depth], [], 0
    cache = head.new_cache()
    for count in chunks(len(tokens), decoder.width):
        x_NH = head.forward(head.embed(tokens[start : start + count]), [Span(cache, start, count)])
        rows.append(x_NH[:count].numpy())
        start += count
    return np.concatenate(rows)


def embedded(decoder: Decoder, ids: Sequence[int]) -> Floats:
    """Embeddings (N, hidden), before the first layer."""
    return np.concatenate([decoder.embed([id_])[:1].numpy() for id_ in ids])


def states_of(
    decoder: Decoder,
    handoff: HandoffBundle,
    tokens: Sequence[int],
    base: int,
    context_rate: int,
    rate: int,
    decided: set[int],
) -> list[bytes]:
    """States of the tokens from `base` on as a device sends them; those in `decided` at `rate`."""
    rows_NH = head_rows(decoder, handoff.depth, tokens)[base:]
    around = [tokens[max(base - 1, 0)], *tokens[base:]]
    embedded_MH = embedded(decoder, around)
    both = [handoff.state_codec.encode(rows_NH, embedded_MH, each) for each in (context_rate, rate)]
    return [pair[base + index in decided] for index, pair in enumerate(zip(*both, strict=True))]


class StateDevice:
    """A device that runs the first layers itself, and keeps the tokens."""

    def __init__(
        self,
        harness: EngineHarness,
        decoder: Decoder,
        handoff: HandoffBundle,
        name: int,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        rate: int = 1,
        context_rate: int = 0,
        fill: bool = False,
    ) -> None:
        self.engine, self.name, self.sampling = harness.engine, name.to_bytes(16, "big"), sampling
        self.handoff, self.rate, self.context_rate, self.fill = handoff, rate, context_rate, fill
        self.tokens = list(prompt)
        self.decided: set[int] = set()  # positions that a token was decoded from
        self.events = EventQueue()
        self.session: Session | None = None
        self._decoder = decoder

    def opening(self, start: int = 0, logprobs: int | None = None, **fields: Any) -> Opening:
        crc32 = checksum(self.tokens[:start])
        model = self.engine.info.fingerprint[:8]
        opening = Opening(model, self.name, start, (), crc32, self.sampling, logprobs)
        ours = {
            "handoff": self.handoff.fingerprint[:8],
            "rate": self.rate,
            "context_rate": self.context_rate,
            "prefill_layers": self.handoff.depth if self.fill else 0,
        }
        return replace(opening, **{**ours, **fields})

    async def open(self, start: int = 0, logprobs: int | None = None, **fields: Any) -> None:
        self.session = await self.engine.open(self.opening(start, logprobs, **fields), self.events)

    def round(self, base: int, extend: int = 1) -> Round:
        """All tokens from `base` on, with their states."""
        before = tuple(position - base for position in sorted(self.decided) if base <= position < len(self.tokens))
        self.decided |= {len(self.tokens) - 1} if extend else set()
        states = states_of(self._decoder, self.handoff, self.tokens, base, self.context_rate, self.rate, self.decided)
        return Round(base, tuple(self.tokens[base:]), extend, tuple(states), before)

    def send(self, base: int, extend: int = 1) -> None:
        self.put(self.round(base, extend))

    def put(self, round_: Round) -> None:
        assert self.session is not None
        self.engine.add(self.session, round_)

    async def receive(self) -> Committed:
        answer = await asyncio.wait_for(self.events.get(), 30)
        if isinstance(answer, IsthmusError):
            raise answer
        assert answer is not None
        return answer

    async def ask(self, base: int, extend: int = 1) -> Committed:
        """A round and its reply; the token is appended."""
        self.send(base, extend)
        answer = await self.receive()
        self.tokens += answer.tokens
        return answer

    def leave(self) -> None:
        assert self.session is not None
        self.engine.leave(self.session)


def prompts(count: int, longest: int = 50, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 259, int(rng.integers(2, longest))).tolist() for _ in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def tiny_model(folder: Path, seed: int) -> Checkpoint:
    """A checkpoint of random weights, named as its folder."""
    return Checkpoint.open(write_tiny_llama(folder, seed=seed, context=64))
