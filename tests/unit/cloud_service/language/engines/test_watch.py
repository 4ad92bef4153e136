"""An engine that comes, is not what was expected, goes, and comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from isthmus.cloud_service.language.engines.check import at_once
from isthmus.cloud_service.language.engines.watch import declare
from isthmus.models.errors import EngineDown
from tests.unit.cloud_service.language.engines.relayed import Device, play, relayed, tiny_tokenizer, until


def test_an_engine_is_declared_after_its_check() -> None:
    async def scenario() -> None:
        async with relayed(check_tokens=300, engine={"context": 512}) as relay:
            info = relay.host.info
            assert info is not None
            assert (info.name, info.vocab, info.context, info.numerics) == ("tiny", 259, 512, "engine")
            assert info.arms == ("cloud", "verify")
            assert info.end_ids == (0, 2)
            assert info.compared >= 300
            assert info.mismatched == 0
            assert info.tokenizer.sha256 == tiny_tokenizer().fingerprint
            assert relay.count("compared_tokens", result="same") == info.compared

    play(scenario)


def test_mismatches_are_declared_and_too_many_mean_no_verify() -> None:
    async def scenario() -> None:
        async with relayed(check_tokens=300, engine={"mismatch_every": 100}) as relay:
            info = relay.host.info
            assert info is not None
            assert 0 < info.mismatched <= info.compared // 20
            assert "verify" in info.arms
        async with relayed(check_tokens=100, engine={"mismatch_every": 5}) as relay:
            assert relay.host.info is not None
            assert relay.host.info.arms == ("cloud",)

    play(scenario)


@pytest.mark.parametrize(
    ("engine", "client", "words"),
    [
        ({"models": ["a", "b"]}, {}, "the engine holds a, b: name the model with --engine-model"),
        ({"models": ["a"]}, {"model": "b"}, "the engine does not hold the model b, it holds a"),
        ({"context": None}, {}, "how long a context it holds: give --engine-context"),
        ({"status": 404}, {}, "another dialect"),
        ({"healthy": False}, {}, "no room"),
    ],
)
def test_what_is_wrong_with_an_engine_is_one_line(engine: Any, client: Any, words: str) -> None:
    async def scenario() -> None:
        async with relayed(engine=engine, client=client, wait=False) as relay:
            await until(lambda: words in relay.host.problem)
            assert relay.host.info is None
            assert relay.count("up") == 0

    play(scenario)


def test_an_engine_with_another_tokenizer_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def other(text: str) -> list[int]:
        return [5000] * len(text)  # outside of the vocabulary here

    async def scenario() -> None:
        async with relayed(wait=False, retry_s=5.0) as relay:
            monkeypatch.setattr(relay.engine, "tokens_of", other)
            await until(lambda: "another tokenizer than --engine-tokenizer" in relay.host.problem)

    play(scenario)


def test_an_engine_that_comes_later_is_used_and_checked_once() -> None:
    async def scenario() -> None:
        async with relayed(wait=False, engine={"status": 502}, check_tokens=50) as relay:
            await until(lambda: "does not reach it" in relay.host.problem)
            relay.scripted.status = 200
            await relay.usable()
            asked = len(relay.scripted.requests)
            assert asked > 2
            await relay.scripted.stop()
            await relay.unusable()
            await relay.scripted.start()
            await relay.usable()
            assert len(relay.scripted.requests) == asked

    play(scenario)


def test_an_engine_that_holds_another_model_now_is_lost_and_examined_anew() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            before = relay.host.info
            relay.scripted.models = ["other"]
            await relay.unusable()
            await relay.usable()
            assert before is not None
            assert relay.host.info is not None
            assert relay.host.info.fingerprint != before.fingerprint

    play(scenario)


def test_an_engine_that_hangs_is_lost() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.01}, client={"silence_s": 0.2}) as relay:
            device = await Device(relay).open()
            device.send(extend=100)
            await device.receive()
            relay.scripted.fault = "hang"
            await relay.unusable()

    play(scenario)


def test_engines_that_declare_the_same_are_replicas() -> None:
    tokenizer = tiny_tokenizer()
    one = declare("/models/tiny", tokenizer, 512, True, (100, 1))
    two = declare("tiny", tokenizer, 512, True, (100, 0))
    assert one.fingerprint == two.fingerprint
    assert one.name == "tiny"
    assert declare("tiny", tokenizer, 256, True, (100, 0)).fingerprint != two.fingerprint


def test_a_fault_of_the_service_loses_the_engine_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with relayed(wait=False) as relay:

            async def broken() -> None:
                raise ZeroDivisionError

            monkeypatch.setattr(relay.engine, "identity", broken)
            await until(lambda: "this service failed" in relay.host.problem)
            await asyncio.sleep(0.1)
            monkeypatch.undo()
            await relay.usable()

    play(scenario)
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_an_engine_that_fails_its_check_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with relayed(wait=False, engine={"fault": "none", "good": 0}, check_tokens=10) as relay:
            await until(lambda: len(relay.scripted.requests) > 20)

    play(scenario)
    own = [record for record in caplog.records if record.name == "isthmus.cloud"]
    assert len(own) == 2  # that it is checked, and what was found


def test_a_check_that_fails_while_it_is_cancelled_is_cancelled() -> None:
    async def scenario() -> None:
        async def failing() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                raise EngineDown("it ended with the service")

        checking = asyncio.create_task(at_once([failing()]))
        await asyncio.sleep(0.01)
        checking.cancel()
        await asyncio.wait([checking])
        assert checking.cancelled()

    play(scenario)
