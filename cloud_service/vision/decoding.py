"""Decodes devices' images in a process that can be killed. `decode_process` is the other end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process

import numpy as np

from isthmus.cloud_service.vision.decode_process import OUTCOMES, READY, REPLY, ImageInput, Pixels
from isthmus.models.errors import InvalidInput, IsthmusError, ServiceError

# Without warnings: Pillow quotes from the file in them, so a device could fill the log.
COMMAND = (sys.executable, "-P", "-W", "ignore", "-m", "isthmus.cloud_service.vision.decode_process")
START_S = 30.0  # of the process, on a machine with much to do
DECODE_S = 2.0  # of one image; the largest that is accepted takes a third of a second
MAX_WORDS = 1000  # bytes of an error
PIPE_BYTES = 1 << 20  # that may be read ahead: most crops at once


class ImageDecoder:
    """One process, which decodes one image at a time. It is replaced when an image takes longer than DECODE_S."""

    def __init__(self) -> None:
        self._process: Process | None = None

    async def start(self) -> None:
        """Start the process, unless it runs. Raises ServiceError."""
        self._process = await self._started()

    async def decode(self, data: bytes, spec: ImageInput) -> Pixels:
        """An image file as pixels (H, W, 3).

        Raises InvalidInput for an image that cannot be decoded or takes too long, Overloaded when it needs more memory
        than there is, ServiceError when the process ended.
        """
        process = await self._started()
        self._process = None  # until it has replied: it would answer the next image with this one's pixels
        try:
            async with asyncio.timeout(DECODE_S):
                reply = await exchange(process, data, spec)
            self._process = process
        except TimeoutError:
            raise InvalidInput(f"the image takes longer than {DECODE_S:.0f} s to decode") from None
        except (EOFError, OSError) as error:
            raise ServiceError("the process that decoded the image ended") from error
        finally:
            if self._process is None:
                await end(process)
        if isinstance(reply, IsthmusError):
            raise reply
        return reply

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            await end(process)

    async def _started(self) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:  # in a group of its own: Ctrl-C would end it before it ignores that
            process = await asyncio.create_subprocess_exec(
                *COMMAND, stdin=PIPE, stdout=PIPE, limit=PIPE_BYTES, process_group=0
            )
        except OSError as error:
            raise ServiceError("the process that decodes images cannot be started") from error
        ready = False
        try:
            async with asyncio.timeout(START_S):
                ready = await pipes(process)[1].readexactly(len(READY)) == READY
        except (TimeoutError, EOFError) as error:
            raise ServiceError("the process that decodes images does not start") from error
        finally:
            if not ready:
                await end(process)
        return process


async def exchange(process: Process, data: bytes, spec: ImageInput) -> Pixels | IsthmusError:
    """Pixels or an error from the process. Raises EOFError or OSError when it ended or sent what it never sends."""
    sink, source = pipes(process)
    sink.write(spec.pack(len(data)) + data)
    await sink.drain()
    outcome, size = REPLY.unpack(await source.readexactly(REPLY.size))
    shape = (*spec.view.crop, 3)
    if outcome >= len(OUTCOMES) or (size > MAX_WORDS if outcome else size != math.prod(shape)):
        raise OSError("unexpected reply")
    body = await source.readexactly(size)
    kind = OUTCOMES[outcome]
    return np.frombuffer(body, np.uint8).reshape(shape) if kind is None else kind(body.decode(errors="replace"))


def pipes(process: Process) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    """Its stdin and stdout. Raises OSError when there are none."""
    if process.stdin is None or process.stdout is None:
        raise OSError("the process has no pipes")
    return process.stdin, process.stdout


async def end(process: Process) -> None:
    """Kill a process and wait for its end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                process.pid, signal.SIGKILL
            )  # `process.kill` reaps a process that has ended, which asyncio waits for
    await process.wait()
