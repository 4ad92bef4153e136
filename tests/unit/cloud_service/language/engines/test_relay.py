"""Sessions over a scripted engine: the tokens are the engine's, whoever drafts and whatever breaks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from isthmus.cloud_service.language.service import LanguageService
from isthmus.models.errors import (
    ContextGone,
    Draining,
    EngineDown,
    EngineFault,
    InvalidInput,
    Overloaded,
    UnknownBundle,
)
from isthmus.models.messages import Processed, Round, Sampling
from tests.scripted_engine import VOCAB, answer_to, next_token
from tests.unit.cloud_service.language.engines.relayed import PROMPT, Device, play, relayed, tiny_tokenizer, until

IDS = ["vllm", "sglang"]
ALL = [*IDS, "openai"]
SAMPLED = Sampling(0.8, 0.9, seed=5)


@pytest.mark.parametrize("dialect", ALL)
def test_a_round_and_its_extension_are_the_engines_tokens(dialect: str) -> None:
    async def scenario() -> None:
        async with relayed(dialect) as relay:
            device = await Device(relay).open()
            device.send(extend=9)
            replies = [await device.receive() for _ in range(10)]
            assert device.tokens[4:] == answer_to(PROMPT, 10)
            assert [reply.extension for reply in replies] == [False] + 9 * [True]
            assert all(reply.passes == 1 for reply in replies)
            assert not device.session.busy  # type: ignore[union-attr]
            assert relay.count("tokens_total") == 10
            assert relay.count("first_token_seconds_count") >= 1

    play(scenario)


@pytest.mark.parametrize("dialect", IDS)
def test_a_draft_is_accepted_up_to_the_first_token_that_differs(dialect: str) -> None:
    async def scenario() -> None:
        async with relayed(dialect) as relay:
            device = await Device(relay).open()
            right = answer_to(PROMPT, 6)
            reply = await device.ask([*right[:3], 200, right[4]])
            assert (reply.accepted, reply.tokens) == (3, (right[3],))
            reply = await device.ask(right[4:6])
            assert (reply.accepted, reply.tokens) == (2, tuple(answer_to(device.tokens[:-1], 1)))
            assert device.tokens[4:] == answer_to(PROMPT, 7)

    play(scenario)


def test_tokens_at_the_engine_are_counted_and_those_that_it_may_still_hold() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay).open()
            device.send(extend=2)
            replies = [await device.receive() for _ in range(3)]
            assert [reply.processed for reply in replies] == [Processed(4), Processed(1), Processed(1)]
            scored = await device.ask(answer_to(device.tokens, 2))
            assert scored.accepted == 2 and scored.processed == Processed(9, repeated=6)
            device.leave()
            device.tokens += [40, 41]
            await device.open(start=10)
            assert (await device.ask()).processed == Processed(12, repeated=9)
            assert relay.count("processed_tokens_total", kind="new") == 12
            assert relay.count("processed_tokens_total", kind="repeated") == 15

    play(scenario)


@pytest.mark.parametrize("dialect", IDS)
def test_log_probabilities_come_with_streamed_and_scored_tokens(dialect: str) -> None:
    async def scenario() -> None:
        async with relayed(dialect) as relay:
            device = await Device(relay).open(logprobs=2)
            streamed = (await device.ask()).logprobs
            scored = (await device.ask(answer_to(device.tokens, 1))).logprobs
            first = next_token(PROMPT)
            assert streamed[0].own == -0.5
            assert streamed[0].top == ((first, -0.5), ((first + 1) % VOCAB, -1.5))
            assert [row.own for row in scored] == [-0.5, -0.5]

    play(scenario)


@pytest.mark.parametrize("dialect", IDS)
def test_a_scored_round_has_the_log_probabilities_of_its_own_tokens(dialect: str) -> None:
    async def scenario() -> None:
        async with relayed(dialect) as relay:
            device = await Device(relay).open(logprobs=3)
            first = next_token(device.tokens)
            relay.host.add(device.session, Round(4, (first, 200, 0, 201), score=True))  # type: ignore[arg-type]
            reply = await device.receive((first, 200, 0, 201))
            assert (reply.accepted, reply.tokens) == (4, ())
            assert [row.own for row in reply.logprobs] == [-0.5, -20.0, -20.0, -20.0]
            assert [len(row.top) for row in reply.logprobs] == [3] * 4
            assert relay.host.info is not None and relay.host.info.scores
            reply = await device.ask()
            assert reply.tokens == (next_token(device.tokens[:-1]),)

    play(scenario)


def test_a_text_server_scores_no_text() -> None:
    async def scenario() -> None:
        async with relayed("openai", engine={"scores": False}) as relay:
            device = await Device(relay).open(logprobs=None)
            assert relay.host.info is not None and not relay.host.info.scores
            with pytest.raises(InvalidInput, match="without log-probabilities"):
                relay.host.add(device.session, Round(4, (200,), score=True))  # type: ignore[arg-type]

    play(scenario)


def test_an_end_of_text_ends_the_session() -> None:
    prompt = next(text for text in ([40, number] for number in range(3, 259)) if next_token(text) == 2)

    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay, prompt).open()
            reply = await device.ask(extend=5)
            assert reply.tokens == (2,)
            assert (await device.ask()).tokens == ()
            assert len(relay.scripted.requests) == 2  # the tokenizer's check, and one stream

    play(scenario)


def test_a_text_server_ends_an_answer_with_an_end_of_text() -> None:
    async def scenario() -> None:
        async with relayed("openai") as relay:
            prompt = next(text for text in ([40, number] for number in range(60, 120)) if next_token(text) == 2)
            device = await Device(relay, prompt).open()
            assert (await device.ask(extend=5)).tokens == (0,)
            assert relay.host.info is not None
            assert relay.host.info.arms == ("cloud",)

    play(scenario)


def test_a_new_round_interrupts_an_extension() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.01}) as relay:
            device = await Device(relay).open()
            device.send(extend=200)
            for _ in range(3):
                await device.receive()
            draft = answer_to(device.tokens, 3)
            device.send(draft, base=len(device.tokens))
            while (reply := await device.receive(draft)).extension:
                pass
            assert reply.accepted == 3
            assert device.tokens[4:] == answer_to(PROMPT, len(device.tokens) - 4)
            await until(lambda: relay.scripted.abandoned == 1)

    play(scenario)


def test_a_device_that_leaves_ends_its_request_and_its_tokens_stay() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.01}) as relay:
            device = await Device(relay).open()
            await device.ask(extend=200)
            device.leave()
            await until(lambda: relay.scripted.running == 0)
            assert relay.scripted.abandoned == 1
            again = Device(relay, device.tokens)
            await again.open(start=len(device.tokens) - 1)
            assert (await again.ask()).tokens == tuple(answer_to(device.tokens, 1))

    play(scenario)


def test_a_sampled_answer_goes_to_the_engine_with_a_seed_of_its_position() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay, sampling=SAMPLED).open()
            await device.ask()
            await device.ask()
            sent = [request for request in relay.scripted.requests if request.get("stream")]
            assert [(each["temperature"], each["top_p"]) for each in sent] == [(0.8, 0.9)] * 2
            assert sent[0]["seed"] != sent[1]["seed"]
            with pytest.raises(InvalidInput, match=r"a draft at temperature 0\.8 cannot be verified"):
                device.send([50])

    play(scenario)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("cut", EngineDown),
        ("oom", EngineFault),
        ("vocab", EngineFault),
        ("json", EngineFault),
        ("huge", EngineFault),
        ("empty", EngineDown),
        ("hang", EngineDown),
        ("drip", EngineDown),
        ("more", EngineFault),
    ],
)
def test_whatever_breaks_an_answer_the_device_keeps_right_tokens_and_gets_one_error(fault: Any, error: Any) -> None:
    async def scenario() -> None:
        async with relayed(client={"silence_s": 0.3}, ping_s=5.0) as relay:
            device = await Device(relay).open()
            relay.scripted.fault = fault
            device.send(extend=9)
            with pytest.raises(error):
                for _ in range(11):
                    await device.receive()
            kept = device.tokens[4:]
            assert kept == answer_to(PROMPT, len(kept))
            assert len(kept) == (10 if fault == "more" else 3)
            relay.scripted.fault = ""
            await relay.usable()
            again = await Device(relay, device.tokens).open()
            assert (await again.ask()).tokens == tuple(answer_to(device.tokens, 1))
            assert relay.count("errors_total", kind="lost" if error is EngineDown else "fault") >= 1

    play(scenario)


@pytest.mark.parametrize("dialect", IDS)
@pytest.mark.parametrize("fault", ["vocab", "nan", "counts", "json", "huge"])
def test_a_wrong_score_is_a_fault_and_never_a_token(dialect: str, fault: Any) -> None:
    async def scenario() -> None:
        async with relayed(dialect) as relay:
            device = await Device(relay).open(logprobs=1)
            relay.scripted.fault, relay.scripted.good = fault, 0
            with pytest.raises(EngineFault):
                await device.ask(answer_to(PROMPT, 3))
            assert device.tokens == list(PROMPT)

    play(scenario)


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (401, EngineDown, "refuses the key|asks for a key"),
        (404, EngineDown, "no such model"),
        (429, Overloaded, "no room"),
        (503, Overloaded, "no room"),
        (502, EngineDown, "does not reach it"),
        (500, EngineFault, "HTTP 500"),
        (400, EngineFault, "HTTP 400"),
        (307, EngineFault, "HTTP 307"),
    ],
)
def test_a_status_becomes_one_error(status: int, error: Any, text: str) -> None:
    async def scenario() -> None:
        async with relayed(ping_s=5.0) as relay:
            device = await Device(relay).open()
            relay.scripted.status, relay.scripted.headers = status, {"Retry-After": "7", "Location": "http://x/"}
            with pytest.raises(error, match=text) as raised:
                await device.ask()
            if isinstance(raised.value, Overloaded):
                assert raised.value.retry_s == 7

    play(scenario)


def test_an_engine_that_is_killed_loses_and_doubles_no_token() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.002}) as relay:
            device = await Device(relay).open()
            for strike in range(3):
                device.send(extend=100)
                with pytest.raises(EngineDown):
                    for number in range(101):
                        await device.receive()
                        if number == 5:
                            await relay.scripted.stop()
                await relay.unusable()
                with pytest.raises(EngineDown, match="does not answer"):
                    await device.open()
                await relay.scripted.start()
                await relay.usable()
                device = await Device(relay, device.tokens, name=strike + 2).open()
            made = device.tokens[4:]
            assert len(made) >= 18
            assert made == answer_to(PROMPT, len(made))
            assert relay.count("up") == 1

    play(scenario)


def test_a_session_opened_again_elsewhere_ends_the_former() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.01}) as relay:
            device = await Device(relay).open()
            device.send(extend=100)
            await device.receive()
            other = await Device(relay, device.tokens).open()
            with pytest.raises(ContextGone, match="opened again elsewhere"):
                while True:
                    await device.receive()
            assert (await other.ask()).tokens

    play(scenario)


def test_what_an_engine_cannot_do_is_refused_in_one_line() -> None:
    async def scenario() -> None:
        async with relayed("openai") as relay:
            device = await Device(relay).open()
            with pytest.raises(InvalidInput, match="cannot verify drafts: use the arm cloud"):
                device.send([50])
            with pytest.raises(InvalidInput, match="gives no log-probabilities"):
                await Device(relay).open(logprobs=1)
            with pytest.raises(UnknownBundle, match="no hidden states"):
                await Device(relay).open(handoff=b"handoff8")
            with pytest.raises(InvalidInput, match="outside of the model's vocabulary"):
                await Device(relay, [40, VOCAB]).open()
            with pytest.raises(InvalidInput, match="no room in the model's context of 512"):
                await Device(relay, [40] * 512).open()
            with pytest.raises(ContextGone):
                await Device(relay, name=9).open(start=2)

    play(scenario)


def test_who_waits_too_long_for_a_place_is_refused() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.05}, hosting={"requests": 1, "wait_s": 0.1}) as relay:
            first, second = await Device(relay, name=1).open(), await Device(relay, name=2).open()
            first.send(extend=100)
            await first.receive()
            with pytest.raises(Overloaded, match="had no place within"):
                await second.ask()

    play(scenario)


def test_a_device_that_does_not_read_pauses_its_stream() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay).open()
            device.send(extend=300)
            await until(lambda: device.events.unread)
            await asyncio.sleep(0.05)
            assert device.events.qsize() == 64
            made = min(301, len(answer_to(PROMPT, 301)))
            for _ in range(made):
                await device.receive()
            assert device.tokens[4:] == answer_to(PROMPT, made)

    play(scenario)


def test_bytes_of_sessions_are_given_back() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            devices = [await Device(relay, name=number).open() for number in range(20)]
            for device in devices:
                await device.ask(extend=5)
            assert relay.queue.held_bytes > 0
            for device in devices:
                device.leave()
            for number in range(20):  # the names are opened anew, by a device without tokens to reuse
                (await Device(relay, name=number).open()).leave()
            table = relay.host._sessions
            for session in list(table):
                table._remove(session)
            assert relay.queue.held_bytes == 0

    play(scenario)


def test_draining_sends_every_device_to_another_replica() -> None:
    async def scenario() -> None:
        async with relayed(engine={"token_s": 0.01}) as relay:
            device = await Device(relay).open()
            device.send(extend=100)
            await device.receive()
            relay.host.drain()
            with pytest.raises(Draining):
                while True:
                    await device.receive()
            with pytest.raises(Draining):
                await Device(relay).open()

    play(scenario)


def test_a_half_close_ends_after_the_outstanding_round() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay).open()
            device.send()
            assert device.session is not None
            relay.host.end(device.session)
            await device.receive()
            assert await asyncio.wait_for(device.events.get(), 5) is None

    play(scenario)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_an_answer_without_any_token_is_a_fault_and_not_asked_for_again(dialect: str) -> None:
    async def scenario() -> None:
        async with relayed(dialect, engine={"good": 0}) as relay:
            device = await Device(relay).open()
            relay.scripted.requests.clear()
            relay.scripted.fault = "none"
            with pytest.raises(EngineFault, match="without a token"):
                await device.ask()
            assert len(relay.scripted.requests) == 1

    play(scenario)


def test_a_device_that_does_not_read_leaves_its_place_to_others() -> None:
    async def scenario() -> None:
        async with relayed(hosting={"requests": 1, "wait_s": 1.0}) as relay:
            deaf = await Device(relay).open()
            deaf.send(extend=300)
            await until(lambda: deaf.events.unread)
            other = await Device(relay, name=2, peer="b").open()
            assert (await other.ask()).tokens

    play(scenario)


def test_reading_takes_no_bytes_that_are_not_there() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            device = await Device(relay).open()
            device.send(extend=300)
            await until(lambda: device.events.unread)
            assert device.session is not None
            device.session.fail(EngineFault("an event that was not counted"))
            relay.queue.take(relay.queue.limit_bytes - relay.queue.held_bytes)
            device.session.sequence.tokens += [50] * 5000
            await device.receive()

    play(scenario)


def test_streams_of_a_tokenizer_share_its_bytes() -> None:
    async def scenario() -> None:
        async with relayed() as relay:
            service = LanguageService(remote=[relay.host])
            assert relay.host.info is not None
            sha256 = relay.host.info.tokenizer.sha256
            raw = service.tokenizer(sha256)
            assert raw == tiny_tokenizer().to_bytes()
            assert service.tokenizer(sha256) is raw
            assert service.tokenizer(bytes(32)) is None

    play(scenario)
