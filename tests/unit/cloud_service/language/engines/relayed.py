"""A relay over a scripted engine with real sockets, and devices whose streams would read its events."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.dialect import Dialect, Probe
from isthmus.cloud_service.language.engines.http import HttpEngine
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.engines.openai import OpenAiProbe
from isthmus.cloud_service.language.engines.relay import RelayHost
from isthmus.cloud_service.language.engines.relay_session import RelaySession
from isthmus.cloud_service.language.engines.sglang import SglangDialect
from isthmus.cloud_service.language.engines.vllm import VllmDialect
from isthmus.cloud_service.language.engines.watch import Watch, WatchSettings
from isthmus.cloud_service.language.session import EventQueue
from isthmus.models.errors import IsthmusError
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import GREEDY, Committed, Opening, Round, Sampling
from isthmus.protos.wire_session import checksum
from tests.bench.tiny_llama import write_tiny_llama
from tests.scripted_engine import ScriptedEngine

PROMPT = (41, 50, 60, 70)  # whose answer is longer than any test reads


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.open(write_tiny_llama(Path(folder) / "tiny"))


def dialect_of(name: str) -> tuple[Dialect | None, Probe | None]:
    tokenizer = tiny_tokenizer()
    if name == "openai":
        return None, OpenAiProbe(tokenizer)
    kind = SglangDialect if name == "sglang" else VllmDialect
    return kind(tokenizer.size, tokenizer.eos_ids), None


class Relay:
    """A relay, the engine behind it, what it counts."""

    def __init__(self, engine: ScriptedEngine, **settings: Any) -> None:
        self.scripted, self.registry, self.queue = engine, CollectorRegistry(), ByteBudget(64 << 20)
        metrics = RequestMetrics(self.registry)
        dialect, probe = dialect_of(engine.dialect)
        client = {"silence_s": 5.0, **settings.pop("client", {})}
        self.engine = HttpEngine(engine.url, dialect, metrics, self.queue, probe=probe, **client)
        hosting = {"requests": 16, "wait_s": 5.0, **settings.pop("hosting", {})}
        watched = {"check_tokens": 0, "retry_s": 0.02, "ping_s": 0.05, **settings}
        self.watch = Watch(self.engine, tiny_tokenizer(), metrics, WatchSettings(engine.url, **watched))
        self.host = RelayHost(self.engine, self.watch, metrics, queue=self.queue, **hosting)

    def count(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"isthmus_cloud_engine_{name}", labels)
        assert value is not None
        return value

    async def usable(self) -> None:
        await until(lambda: self.host.info is not None)

    async def unusable(self) -> None:
        await until(lambda: self.host.info is None)


@asynccontextmanager
async def relayed(
    dialect: str = "vllm", *, wait: bool = True, engine: Any = None, **settings: Any
) -> AsyncIterator[Relay]:
    """A relay that runs over a scripted engine with these `settings`."""
    scripted = await ScriptedEngine(dialect, **(engine or {})).start()
    relay = Relay(scripted, **settings)
    running = asyncio.create_task(relay.host.run())
    try:
        if wait:
            await relay.usable()
        yield relay
    finally:
        relay.host.drain()
        await asyncio.wait_for(running, 10)
        await scripted.stop()


class Device:
    """One device: its tokens, and the queue that its stream would read."""

    def __init__(
        self, relay: Relay, prompt: Sequence[int] = PROMPT, name: int = 1, sampling: Sampling = GREEDY, peer: str = "a"
    ) -> None:
        self.host, self.name, self.sampling, self.peer = relay.host, name.to_bytes(16, "big"), sampling, peer
        self.tokens = list(prompt)
        self.events = EventQueue()
        self.session: RelaySession | None = None

    async def open(self, start: int = 0, logprobs: int | None = None, **fields: Any) -> Device:
        opening = Opening(b"model--8", self.name, start, tuple(self.tokens[start:]), checksum(self.tokens))
        opening = replace(opening, sampling=self.sampling, logprobs=logprobs, **fields)
        self.session = await self.host.open(opening, self.events, self.peer)
        return self

    def send(self, draft: Sequence[int] = (), extend: int = 0, base: int | None = None) -> None:
        assert self.session is not None
        self.host.add(self.session, Round(len(self.tokens) if base is None else base, tuple(draft), extend))

    async def receive(self, draft: Sequence[int] = ()) -> Committed:
        event = await asyncio.wait_for(self.events.get(), 10)
        if isinstance(event, IsthmusError):
            raise event
        assert event is not None
        if event.accepted or event.tokens:
            self.tokens[event.base :] = [*draft[: event.accepted], *event.tokens]
        return event

    async def ask(self, draft: Sequence[int] = (), extend: int = 0) -> Committed:
        self.send(draft, extend)
        return await self.receive(draft)

    def leave(self) -> None:
        assert self.session is not None
        self.host.leave(self.session)


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a test that is a coroutine."""

    async def whole() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(whole())
