"""The client, over real sockets: keys, connections, bounds, what it says of failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.events import EventSplitter
from isthmus.cloud_service.language.engines.http import HttpEngine, retry_after, without_key
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.models.errors import EngineDown, EngineFault, Overloaded
from isthmus.models.messages import GREEDY
from tests.scripted_engine import KEY, answer_to
from tests.unit.cloud_service.language.engines.relayed import PROMPT, Device, dialect_of, play, relayed, until


def test_a_key_goes_to_the_engine_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with relayed(engine={"key": KEY}, client={"key": KEY}) as relay:
            device = await Device(relay).open()
            assert (await device.ask()).tokens
            for status in (400, 401, 500):
                relay.scripted.status = status  # whose answers repeat the key
                with pytest.raises((EngineDown, EngineFault)) as raised:
                    await device.ask()
                assert KEY not in str(raised.value)
                relay.scripted.status = 200
                await relay.usable()

    play(scenario)
    assert KEY not in caplog.text
    assert "HTTP 400" in caplog.text


@pytest.mark.parametrize(("key", "words"), [("", "asks for a key"), ("wrong", "refuses the key of this service")])
def test_a_wrong_key_is_one_clear_line(key: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with relayed(engine={"key": KEY}, client={"key": key}, wait=False) as relay:
            await until(lambda: "HTTP 401" in relay.host.problem)
            await asyncio.sleep(0.1)
            assert words in relay.host.problem

    play(scenario)
    assert len(caplog.records) == 1


def test_one_connection_serves_one_stream_after_another() -> None:
    async def scenario() -> None:
        async with relayed(ping_s=60.0) as relay:
            device = await Device(relay).open()
            for _ in range(5):
                device.send(extend=3)
                for _ in range(4):
                    await device.receive()
                await until(lambda: device.session is not None and device.session.task is None)
            client = relay.engine._client
            assert client is not None
            assert client.connector is not None
            assert sum(map(len, client.connector._conns.values())) == 1

    play(scenario)


def test_an_answer_that_does_not_fit_into_the_budget_is_no_answer() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            relay.queue.take(relay.queue.limit_bytes - 100)
            with pytest.raises(Overloaded):
                await relay.engine.score([*PROMPT, *answer_to(PROMPT, 20)], len(PROMPT), None)
            assert relay.queue.held_bytes == relay.queue.limit_bytes - 100

    play(scenario)


def test_a_cancelled_request_ends_at_the_engine() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            relay.scripted.fault = "hang"
            asking = asyncio.create_task(relay.engine.score([*PROMPT, 50], len(PROMPT), None))
            await until(lambda: relay.scripted.running == 1)
            asking.cancel()
            await until(lambda: relay.scripted.running == 0)
            assert relay.scripted.abandoned == 1

    play(scenario)


def test_a_stream_ends_by_itself_after_the_last_token() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            found = [choice.token async for choice in relay.engine.stream(PROMPT, GREEDY, 5, None)]
            assert found == answer_to(PROMPT, 5)

    play(scenario)


def test_events_are_split_wherever_they_are_cut() -> None:
    raw = b': ping\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": 2}\n\n'
    for cut in range(len(raw)):
        splitter = EventSplitter()
        assert splitter.push(raw[:cut]) + splitter.push(raw[cut:]) == [b'{"a": 1}', b'{"b": 2}']
    with pytest.raises(EngineFault, match="more than 10 bytes"):
        EventSplitter(10).push(b"data: aaaaaaaaa")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("7", 7), ("99999", 600), ("-1", 0), ("Wed, 21 Oct 2026", 0), ("9" * 40, 0), ("٣", 0)],
)
def test_a_hint_to_wait_is_bounded(text: str, seconds: float) -> None:
    assert retry_after(text) == seconds


async def interim_responses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [interim_responses, slow_body])
def test_an_answer_that_never_ends_is_no_answer(answer: Any) -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        metrics = RequestMetrics(CollectorRegistry())
        engine = HttpEngine(url, dialect_of("vllm")[0], metrics, ByteBudget(1 << 20), silence_s=0.2)
        with pytest.raises(EngineDown, match="did not answer within"):
            await engine.score([*PROMPT], 2, None)
        await engine.close()
        server.close()

    play(scenario)


def test_of_a_key_that_is_cut_nothing_is_left() -> None:
    assert without_key(f"wrong key {KEY}, {KEY}", KEY) == "wrong key …, …"
    assert without_key(f"wrong key: {KEY[:-2]}", KEY) == "wrong key: "
