"""The process that decodes images: what it answers, and that it can be killed, exhausted and replaced."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus.cloud_service.vision import decode_process, decoding
from isthmus.cloud_service.vision.decode_process import READY, REPLY, ImageInput
from isthmus.cloud_service.vision.decoding import ImageDecoder
from isthmus.models.errors import InvalidInput, IsthmusError, Overloaded, ServiceError
from isthmus.models.vision.images import View, fitted, open_image

SPEC = ImageInput(1 << 20, View(48, (32, 48)))


def encoded(photo: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, form)
    return buffer.getvalue()


def scenario(play: Callable[[ImageDecoder], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        decoder = ImageDecoder()
        try:
            await asyncio.wait_for(play(decoder), 60)
        finally:
            await decoder.close()

    asyncio.run(both())


def pid(decoder: ImageDecoder) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def test_one_process_decodes_image_after_image_and_refuses_the_broken_ones(photo: Image.Image) -> None:
    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        first = pid(decoder)
        for data in (encoded(photo), encoded(photo, "JPEG"), encoded(photo, "WEBP")):
            for refused, words in ((b"", "empty"), (data[: len(data) // 2], "is truncated"), (b"GIF89a", "a GIF file")):
                with pytest.raises(InvalidInput, match=words):
                    await decoder.decode(refused, SPEC)
            np.testing.assert_array_equal(await decoder.decode(data, SPEC), fitted(open_image(data), SPEC.view))
        with pytest.raises(InvalidInput, match="1024x1025 pixels, at most 1048576"):
            await decoder.decode(encoded(Image.new("L", (1024, 1025))), SPEC)
        for number in (signal.SIGTERM, signal.SIGINT):  # of the group that the service is stopped with
            os.kill(first, number)
        await decoder.decode(encoded(photo), SPEC)
        assert pid(decoder) == first
        loaded = Path(f"/proc/{first}/maps").read_text()
        assert "numpy" in loaded and "torch" not in loaded

    scenario(play)


def test_a_process_that_was_killed_is_replaced(photo: Image.Image) -> None:
    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        first = pid(decoder)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ServiceError, match="ended"):
            await decoder.decode(encoded(photo), SPEC)
        assert (await decoder.decode(encoded(photo), SPEC)).shape == (32, 48, 3)
        assert pid(decoder) != first

    scenario(play)


CHILD = """
import sys, time
from isthmus.cloud_service.vision import decode_process
{body}
decode_process.main()
"""


def script(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put lines before the process's own."""
    monkeypatch.setattr(decoding, "COMMAND", (sys.executable, "-c", CHILD.format(body=body)))


def test_an_image_that_takes_too_long_is_refused_and_its_process_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    script(
        monkeypatch,
        "decode_process.decode = lambda data, spec: time.sleep(60 * len(data)) or __import__('numpy').zeros(9)",
    )
    monkeypatch.setattr(decoding, "DECODE_S", 0.5)

    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        first = pid(decoder)
        with pytest.raises(InvalidInput, match="longer than"):
            await decoder.decode(b"bomb", SPEC)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    scenario(play)


def test_a_cancelled_decode_leaves_no_reply_for_the_next(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        task = asyncio.create_task(decoder.decode(encoded(Image.new("RGB", (900, 900))), SPEC))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await decoder.decode(encoded(photo), SPEC)
        np.testing.assert_array_equal(found, fitted(open_image(encoded(photo)), SPEC.view))

    scenario(play)


def test_an_image_that_exhausts_the_memory_is_the_service_s_limit(
    monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    script(monkeypatch, "decode_process.open_image = lambda data, most: bytearray(600 << 20)")

    async def play(decoder: ImageDecoder) -> None:
        with pytest.raises(Overloaded, match="not enough memory"):
            await decoder.decode(encoded(photo), SPEC)

    scenario(play)


@pytest.mark.parametrize("reply", [REPLY.pack(9, 4), REPLY.pack(0, 1 << 31), REPLY.pack(0, 5), REPLY.pack(1, 1 << 30)])
def test_a_reply_that_cannot_be_right_ends_the_process(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    body = f"sys.stdout.buffer.write(b'R' + {reply!r} + bytes(64)); sys.stdout.flush(); time.sleep(60)"
    script(monkeypatch, body)

    async def play(decoder: ImageDecoder) -> None:
        with pytest.raises(ServiceError, match="ended"):
            await decoder.decode(b"x", SPEC)
        assert decoder._process is None

    scenario(play)


@pytest.mark.parametrize("command", [("/nonexistent",), (sys.executable, "-c", "")])
def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setattr(decoding, "COMMAND", command)

    async def play(decoder: ImageDecoder) -> None:
        with pytest.raises(ServiceError, match="start"):
            await decoder.start()

    scenario(play)


@pytest.mark.parametrize(("failure", "expected"), [(MemoryError(), Overloaded), (InvalidInput("broken"), InvalidInput)])
def test_errors_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, expected: type[IsthmusError]
) -> None:
    def failing(*_: object) -> None:
        raise failure

    monkeypatch.setattr(decode_process, "open_image", failing)
    outcome, _ = decode_process.answer(b"x", SPEC)
    assert decode_process.OUTCOMES[outcome] is expected


def test_a_process_that_ended_between_two_images_costs_none(photo: Image.Image) -> None:
    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        assert decoder._process is not None
        os.kill(pid(decoder), signal.SIGKILL)
        await decoder._process.wait()
        assert (await decoder.decode(encoded(photo), SPEC)).shape == (32, 48, 3)

    scenario(play)


def test_a_signal_to_the_group_of_the_service_does_not_reach_a_process_that_starts() -> None:
    async def play(decoder: ImageDecoder) -> None:
        await decoder.start()
        assert os.getpgid(pid(decoder)) != os.getpgid(0)

    scenario(play)


def test_an_image_that_pillow_warns_about_writes_nothing_into_the_log(
    photo: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\x12\x01\x03\0\1\0\0\0\1\0\0\0")

    async def play(decoder: ImageDecoder) -> None:
        await decoder.decode(buffer.getvalue(), SPEC)

    scenario(play)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("already", [resource.RLIM_INFINITY, 1 << 50, 64 << 20])
def test_an_operator_s_limit_of_memory_is_kept(monkeypatch: pytest.MonkeyPatch, already: int) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (already, already))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    decode_process.limit_memory()
    ((soft, hard),) = limits
    assert hard == already
    assert soft > 0
    assert already == resource.RLIM_INFINITY or soft <= already


def test_a_process_whose_service_was_killed_ends_without_a_word(photo: Image.Image) -> None:
    process = subprocess.Popen(decoding.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) == READY
    process.stdout.close()
    data = encoded(photo)
    process.stdin.write(SPEC.pack(len(data)) + data)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == -signal.SIGPIPE
