"""All that the gRPC service knows of the two wings."""

from __future__ import annotations

import asyncio
from typing import Protocol

from isthmus.models.errors import IsthmusError
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest, Committed, ModelInfo, Opening, Round


class VisionService(Protocol):
    """Predicts from photos and latents."""

    @property
    def bundles(self) -> tuple[BundleInfo, ...]: ...

    async def submit(self, request: CloudRequest, peer: str) -> CloudReply: ...


class StreamHandler(Protocol):
    """Handles the messages of one `Generate` stream. In `events` None follows the last one."""

    @property
    def events(self) -> asyncio.Queue[Committed | IsthmusError | None]: ...

    @property
    def busy(self) -> bool:
        """Whether a round has no reply yet."""
        ...

    def begin_opening(self) -> None: ...

    async def handle(self, request: Opening | Round) -> None: ...

    def end(self) -> None: ...

    def leave(self) -> None: ...


class LanguageService(Protocol):
    """Generates tokens in sessions."""

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """Those that can be used now."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """Why models cannot be used, each in a line."""
        ...

    def tokenizer(self, sha256: bytes) -> bytes | None:
        """The tokenizer of this SHA-256; None where no model has it."""
        ...

    def new_handler(self, peer: str, session_bytes: int | None = None) -> StreamHandler:
        """`session_bytes`: of KV caches that the sessions of `peer` may hold; None for no limit."""
        ...
