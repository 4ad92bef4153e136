"""What an engine is: it says what it holds, generates tokens one by one, and scores a text that somebody else wrote.

    ids ── stream ──> the tokens that follow, as they are generated
    ids ── score ──>  for each position from `start` on the token that the engine would have chosen there

An engine keeps no sessions: its cache of prefixes is its own business. Sessions over one are in `relay`; the native
engine (`native`) keeps its sessions itself. Both are a `SessionHost`, which is all that streams of devices know.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from isthmus.cloud_service.language.session import EventQueue
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import Logprobs, ModelInfo, Opening, Processor, Round, Sampling


@dataclass(frozen=True, slots=True)
class Choice:
    """The token that an engine chooses at a position; `logprobs` where they were requested."""

    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What an engine says of the model that it holds. `context` 0: it does not say."""

    name: str
    context: int
    version: str = ""
    scores: bool = True  # whether `score` can be called
    logprobs: bool = True  # whether choices can have log-probabilities
    processors: tuple[Processor, ...] = ()  # what a stream's choices can be made with


class Engine(Protocol):
    """Runs one language model. Raises EngineDown, EngineFault or Overloaded, whatever is called."""

    async def identity(self) -> EngineIdentity:
        """What it holds now, which may have changed since the last call."""
        ...

    async def ping(self) -> None:
        """Raises EngineDown unless it could answer a request now."""
        ...

    async def tokens_of(self, text: str) -> list[int] | None:
        """Its own ids of a text, without a beginning-of-text token; None where it does not say."""
        ...

    def stream(
        self, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> AsyncGenerator[Choice, None]:
        """At most `limit` tokens after `ids`; the last may be an end-of-text token. Closing it ends the request.

        `top`: None, or that many of the likeliest tokens in each choice's log-probabilities.
        """
        ...

    async def score(self, ids: Sequence[int], start: int, top: int | None) -> list[Choice]:
        """The greedy choices of the positions `start` to len(ids), the last of which follows the text; `start` >= 1."""
        ...

    async def prompt_logprobs(self, ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        """Of the tokens at `start` to len(ids) - 1 themselves, where `score` can be called; `start` >= 1."""
        ...

    async def close(self) -> None:
        """End every request."""
        ...


class OpenSession(Protocol):
    """A session that a host has opened."""

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        ...


S = TypeVar("S", bound=OpenSession)


class SessionHost(Protocol[S]):
    """The sessions of one language model."""

    @property
    def info(self) -> ModelInfo | None:
        """The model, as it is described to devices; None while it cannot be used."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def problem(self) -> str:
        """Why it cannot be used; empty while it can."""
        ...

    async def open(self, opening: Opening, events: EventQueue, peer: str) -> S: ...

    def add(self, session: S, round_: Round) -> None: ...

    def end(self, session: S) -> None: ...

    def leave(self, session: S) -> None: ...

    async def keep_within(self, peer: str, limit_bytes: int) -> bool:
        """Free KV caches that no device of `peer` is connected to, beyond a limit. Whether the others are within it."""
        ...

    def drain(self) -> None: ...

    async def run(self) -> None: ...
