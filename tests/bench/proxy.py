"""An emulated link: a TCP proxy with a rate and a delay in each direction, which counts every byte.

It needs no root: bytes wait for their turn at the rate, then for half the round trip. The kernel's buffers are in front
of it, so TCP sees loopback: packet loss and slow start are not emulated.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 1460  # one Ethernet segment: a large upload blocks a small one no longer than this


@dataclass(frozen=True)
class LinkSpec:
    """`rate_bps` bits a second in each direction (None: unlimited), `rtt_s` round trip added to loopback's own."""

    rate_bps: float | None = 2e6
    rtt_s: float = 0.040


class Direction:
    """Bytes in one direction: they wait for the rate, then for half the round trip."""

    def __init__(self, spec: LinkSpec) -> None:
        self._spec = spec
        self._free_at_s = 0.0
        self.bytes = 0
        self.silent = False  # bytes are read and dropped

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delayed: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=4096)
        delivery = asyncio.create_task(self._deliver(delayed, writer))
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(CHUNK_BYTES):
                if self.silent:
                    continue
                now_s = loop.time()
                if self._spec.rate_bps is not None:
                    self._free_at_s = max(self._free_at_s, now_s) + 8 * len(data) / self._spec.rate_bps
                    now_s = self._free_at_s
                self.bytes += len(data)
                await delayed.put((now_s + self._spec.rtt_s / 2, data))
                await asyncio.sleep(max(now_s - loop.time(), 0))
            await delayed.put((loop.time() + self._spec.rtt_s / 2, b""))
            await delivery
        except (ConnectionError, asyncio.CancelledError):
            delivery.cancel()
        finally:
            writer.close()

    async def _deliver(self, delayed: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at_s, data = await delayed.get()
            await asyncio.sleep(max(at_s - loop.time(), 0))
            if not data:
                return
            writer.write(data)
            await writer.drain()


class LinkProxy:
    """Listens on a free loopback port and forwards to `target_port`, in a thread of its own."""

    def __init__(self, target_port: int, spec: LinkSpec) -> None:
        self._target_port = target_port
        self.up, self.down = Direction(spec), Direction(spec)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link-proxy", daemon=True)
        self._thread.start()
        self._black_hole = False
        self._server = self._run(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> LinkProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cut(self) -> None:
        """Break every open connection; new ones are accepted."""
        self._run(self._cut())

    def black_hole(self, on: bool) -> None:
        """While on, new connections are accepted but not forwarded: a half-open link."""
        self._black_hole = on

    def silence(self, on: bool) -> None:
        """While on, bytes of open connections are dropped: an unplugged cable."""
        self.up.silent = self.down.silent = on

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _cut(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._black_hole:
                await asyncio.sleep(3600)
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            await asyncio.gather(self.up.pump(reader, far_writer), self.down.pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)
