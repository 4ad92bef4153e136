"""One `Generate` stream: its messages in order, to the session they are about. Knows nothing about gRPC's contexts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from cloud_service.generation import Answer, Generation, Session
from models.errors import InvalidInput, IsthmusError, UnknownBundle
from models.language.session import Opening
from protos import wire_session
from protos.isthmus.v1 import isthmus_pb2 as pb


class Talk:
    """What one device says about one answer. `answers` ends with None after the last of a stream that half-closed."""

    def __init__(self, generations: Mapping[bytes, Generation]) -> None:
        self._generations = generations
        self._generation: Generation | None = None
        self._session: Session | None = None
        self.answers: asyncio.Queue[Answer | None] = asyncio.Queue()

    async def listen(self, requests: AsyncIterator[pb.GenerateRequest]) -> None:
        """Take messages until the device half-closes. What is wrong with one is answered, and the next one read."""
        async for message in requests:
            try:
                await self._take(message)
            except IsthmusError as error:
                self.answers.put_nowait(error)
        self.answers.put_nowait(None)

    def leave(self) -> None:
        """The device has gone."""
        if self._generation is not None and self._session is not None:
            self._generation.leave(self._session)
        self._session = None

    async def _take(self, message: pb.GenerateRequest) -> None:
        request = wire_session.unpack_generate(message)
        if isinstance(request, Opening):
            self.leave()
            self._generation = self._generations.get(request.model)
            if self._generation is None:
                held = ", ".join(sorted(key.hex() for key in self._generations)) or "none"
                raise UnknownBundle(f"model {request.model.hex()} is not held here, there is {held}")
            self._session = await self._generation.open(request, self.answers)
        elif self._generation is None or self._session is None:
            raise InvalidInput("a round came before its session was opened")
        else:
            self._generation.add(self._session, request)
