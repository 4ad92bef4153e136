"""Whatever the batch, the drafts and the memory, each sequence is that of plain decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from isthmus.cloud_service.language.engines import native
from isthmus.models.errors import Draining, InvalidInput, Overloaded, ServiceError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import choose, logprobs
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, EXACT_LAST, KVFill
from isthmus.models.messages import GREEDY, Committed, Logprobs, Round, TokenizerInfo
from isthmus.protos.limits import MAX_ROUNDS
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import (
    CONTEXT,
    WIDTH,
    Device,
    EngineHarness,
    Scenario,
    plain,
    prompts,
    until,
)


def test_an_extension_streams_tokens_after_its_round(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        expected = plain(decoder, [5, 6, 7], 8)
        device = Device(harness, 1, [5, 6, 7])
        await device.open()
        events = [await device.ask(expected[3:5], extend=5)]
        events += [await device.receive() for _ in range(5)]
        assert [answer.extension for answer in events] == [False] + [True] * 5
        assert [answer.base for answer in events] == [3, 6, 7, 8, 9, 10]
        assert device.tokens == [*expected, *plain(decoder, expected, 1)[-1:]][: len(device.tokens)]
        assert len(device.tokens) == 11
        await asyncio.sleep(0.05)
        assert device.events.empty()

    scenario(play)


def test_scored_tokens_are_committed_as_they_are(scenario: Scenario, decoder: Decoder) -> None:
    text = [5, 0, *prompts(1, seed=4)[0], 2, 9, 0]  # ends of text are tokens like others

    async def play(harness: EngineHarness) -> None:
        device, found, accepted = Device(harness, 1, text[:1]), list[Logprobs](), list[int]()
        await device.open(logprobs=2)
        assert device.session is not None
        for start, stop in pairwise([1, 2, 5, len(text) - 3, len(text)]):
            harness.engine.add(device.session, Round(start, tuple(text[start:stop]), score=True))
            reply = await device.receive(text[start:stop])
            accepted.append(reply.accepted)
            found += reply.logprobs
            assert reply.tokens == ()
        assert accepted == [1, 3, len(text) - 8, 3]
        cache = decoder.new_cache()
        for position, row in enumerate(found):
            x_NH = decoder.forward(decoder.embed([text[position]]), [Span(cache, position, 1)])
            assert row == Logprobs(*logprobs(decoder.logits(x_NH)[0].numpy(), text[position + 1], 2))
        assert harness.count("draft_tokens_total", result="accepted") == 0
        assert len((await device.ask()).tokens) == 1  # the text goes on from there

    scenario(play)


def test_a_scored_round_needs_log_probabilities(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [5, 6])
        await device.open()
        assert device.session is not None
        with pytest.raises(InvalidInput, match="without log-probabilities"):
            harness.engine.add(device.session, Round(2, (7,), score=True))

    scenario(play)


def test_a_round_ends_an_extension(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        expected = plain(decoder, [5, 6, 7], 100)
        device = Device(harness, 1, [5, 6, 7])
        await device.open()
        await device.ask(extend=90)
        for _ in range(3):
            await device.receive()
        device.send()
        while (await device.receive()).extension:
            pass
        assert device.tokens == expected[: len(device.tokens)]
        assert len(device.tokens) < 90
        await asyncio.sleep(0.05)
        assert device.events.empty()
        await device.ask(expected[len(device.tokens) : len(device.tokens) + 4])
        assert device.tokens == expected[: len(device.tokens)]

    scenario(play)


def test_rounds_after_a_stale_one_end_its_extension(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [5, 6, 7])
        await device.open()
        assert device.session is not None
        harness.decoder.gate.clear()
        for _ in range(2):
            harness.engine.add(device.session, Round(9, (1,), extend=50))
        device.send()
        harness.decoder.gate.set()
        assert [await device.receive() for _ in range(2)] == [Committed(3), Committed(3)]
        last = await device.receive()
        assert (last.base, last.extension) == (3, False)
        harness.engine.add(device.session, Round(9, (1,), extend=3))
        assert await device.receive() == Committed(4)
        assert [(await device.receive()).extension for _ in range(3)] == [True] * 3
        assert device.tokens == plain(decoder, [5, 6, 7], 4)

    scenario(play)


def test_rounds_ahead_are_answered_in_order(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        expected = plain(decoder, [9, 8], 12)
        device = Device(harness, 1, [9, 8])
        await device.open()
        assert device.session is not None
        drafts = [tuple(expected[2:5]), tuple(expected[5:8]), tuple(expected[8:10])]
        for base, draft in zip((2, 5, 8), drafts, strict=True):
            harness.engine.add(device.session, Round(base, draft))
        events = [await device.receive(draft) for draft in drafts]
        assert [(answer.base, answer.accepted) for answer in events] == [(2, 3), (5, 3), (8, 2)]
        assert device.tokens == expected[:11]

    scenario(play)


def test_a_device_that_disconnects_during_a_round_affects_no_other(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        leaver, stayer = Device(harness, 1, list(range(10, 50))), Device(harness, 2, [7, 8, 9])
        await leaver.open()
        await stayer.open()
        harness.decoder.gate.clear()
        leaver.send([1, 2, 3])
        stayer.send()
        await until(lambda: harness.decoder.inside)
        leaver.leave()
        harness.decoder.gate.set()
        await stayer.receive()
        await stayer.ask(extend=10)
        for _ in range(10):
            await stayer.receive()
        assert stayer.tokens == plain(decoder, [7, 8, 9], 12)
        assert leaver.events.empty()
        await leaver.open(start=40)
        await leaver.ask()
        assert leaver.tokens == plain(decoder, list(range(10, 50)), 1)

    scenario(play)


def test_rounds_of_a_device_that_disconnected_are_not_computed(scenario: Scenario) -> None:
    """Neither the rest of the round under way, nor its extension, nor a round that arrives with the disconnect."""

    async def play(harness: EngineHarness) -> None:
        leaver, stayer = Device(harness, 1, list(range(10, 50))), Device(harness, 2, [7, 8, 9])
        await leaver.open()
        await stayer.open()
        harness.decoder.gate.clear()
        leaver.send(extend=5)
        await until(lambda: harness.decoder.inside)
        leaver.leave()
        leaver.send()
        harness.decoder.gate.set()
        session = leaver.session
        assert session is not None
        await until(lambda: session.sequence.scheduled is None and not session.rounds)
        await stayer.ask()
        assert harness.decoder.rows == [WIDTH, 3]
        assert session.sequence.tokens == list(range(10, 50))
        assert leaver.events.empty()

    scenario(play)


def test_rounds_that_wait_when_the_engine_is_drained_are_not_computed(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, list(range(10, 50)))
        await device.open()
        harness.decoder.gate.clear()
        device.send()
        device.send()
        await until(lambda: harness.decoder.inside)
        harness.engine.drain()
        harness.decoder.gate.set()

    assert scenario(play).decoder.rows == [WIDTH]


def test_too_many_waiting_rounds_are_refused_and_the_others_answered(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [5, 6, 7])
        await device.open()
        for _ in range(MAX_ROUNDS):
            device.send()
        with pytest.raises(Overloaded, match=f"{MAX_ROUNDS} rounds"):
            device.send()
        events = [await device.receive() for _ in range(MAX_ROUNDS)]
        assert [answer.base for answer in events] == [3] * MAX_ROUNDS
        assert len(device.tokens) == 3 + MAX_ROUNDS

    scenario(play)


def test_a_failing_step_is_an_error_for_each_of_its_sessions_and_the_next_one_works(
    scenario: Scenario, decoder: Decoder
) -> None:
    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, [7, 8, 9 + number]) for number in range(3)]
        for device in devices:
            await device.open()
            await device.ask()
        harness.decoder.failure = RuntimeError("a kernel broke")
        harness.decoder.gate.clear()
        for device in devices:
            device.send([1, 2])
        harness.decoder.gate.set()
        for device in devices:
            with pytest.raises(ServiceError, match="the step failed"):
                await device.receive()
        harness.decoder.failure = None
        for number, device in enumerate(devices):
            await device.ask()
            assert device.tokens == plain(decoder, [7, 8, 9 + number], 2)

    scenario(play)


def test_draining_is_sent_to_every_device_and_ends_the_engine(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, [7, 8, 9]) for number in range(3)]
        for device in devices:
            await device.open()
        devices[0].leave()
        harness.decoder.gate.clear()
        devices[1].send(extend=100)
        await until(lambda: harness.decoder.inside)
        late = asyncio.create_task(Device(harness, 5, [1, 2]).open())
        await asyncio.sleep(0)
        harness.engine.drain()
        harness.decoder.gate.set()
        for device in devices[1:]:
            with pytest.raises(Draining):
                await device.receive()
        with pytest.raises(Draining):
            devices[2].send()
        with pytest.raises(Draining):
            await late
        assert devices[0].events.empty()

    assert len(scenario(play).decoder.rows) == 1


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_none_follows_the_last_event_of_a_device_that_half_closed(scenario: Scenario, rounds: int) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [7, 8, 9])
        await device.open()
        harness.decoder.gate.clear()
        for _ in range(rounds):
            device.send(extend=4)
        assert device.session is not None
        harness.engine.end(device.session)
        harness.decoder.gate.set()
        events = []
        while (answer := await device.events.get()) is not None:
            events.append(answer)
        assert len(events) == rounds + (4 if rounds else 0)

    scenario(play)


def test_log_probabilities_come_with_each_token(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        expected = plain(decoder, [5, 6, 7], 8)
        device = Device(harness, 1, [5, 6, 7])
        await device.open(logprobs=2)
        committed = await device.ask(expected[3:6])
        assert len(committed.logprobs) == 4
        for row, id_ in zip(committed.logprobs, expected[3:7], strict=True):
            assert row.top[0] == (id_, row.own)  # greedy: the likeliest

    scenario(play)


def test_info_names_the_model_and_its_numerics(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def play() -> None:
        info = EngineHarness(checkpoint, decoder, 1).engine.info
        assert (info.name, info.vocab, info.context, info.precision) == ("tiny", 259, CONTEXT, f"float32/{WIDTH}")
        assert (info.fingerprint, info.numerics, info.arms) == (checkpoint.fingerprint, "bitwise", ("cloud", "verify"))
        own = checkpoint.tokenizer
        assert info.tokenizer == TokenizerInfo(own.fingerprint, len(own.to_bytes()), own.vocabulary)
        assert set(info.end_ids) == own.eos_ids

    asyncio.run(play())


def test_warm_up_proves_that_results_do_not_depend_on_the_batch(
    checkpoint: Checkpoint, decoder: Decoder, tmp_path: Path
) -> None:
    async def play() -> None:
        harness = EngineHarness(checkpoint, decoder, 1)
        harness.engine.warm_up()
        forward = decoder.forward
        harness.decoder.forward = lambda x_NH, spans: forward(x_NH, spans) + float(len(spans))  # type: ignore[method-assign]
        with pytest.raises(ServiceError, match="results on this machine depend on the batch"):
            harness.engine.warm_up()

    asyncio.run(play())


class ByHand:
    """A prompt whose tokens up to `guessed`, except the first, run through `prefill_layers` layers, one a step."""

    def __init__(self, decoder: Decoder, handoff: HandoffBundle, prefill_layers: int) -> None:
        self._decoder, self._depth, self._kept = decoder, handoff.depth, prefill_layers
        self._fill = KVFill(*handoff.kv_fill(), decoder[self._depth :], prefill_layers - handoff.depth)

    def decode(self, prompt: Sequence[int], guessed: int, count: int) -> list[int]:
        tokens, cache, decoder = list(prompt), self._decoder.new_cache(), self._decoder
        for position in range(len(prompt) + count - 1):
            spans = [Span(cache, position, 1)]
            x_NH = decoder[: self._depth].forward(decoder.embed([tokens[position]]), spans)
            if EXACT_FIRST <= position < guessed:
                if self._kept > self._depth:
                    decoder[self._depth : self._kept].forward(x_NH, spans)
                self._fill.write(cache, position, x_NH[:1])
                continue
            x_NH = decoder[self._depth :].forward(x_NH, spans)
            if position + 1 == len(tokens):
                tokens.append(choose(decoder.logits(x_NH)[0].numpy(), GREEDY, position + 1))
        return tokens


LONG = prompts(1, longest=120, seed=9)[0] * 4


@pytest.mark.parametrize(("prefill_layers", "depths"), [(1, [1]), (2, [1]), (1, [2, 1]), (2, [2, 1])])
def test_a_prompt_but_its_end_may_skip_the_last_layers(tmp_path: Path, prefill_layers: int, depths: list[int]) -> None:
    """Beside a prompt that runs through all of them, and with its cache evicted in between.

    Of several bundles the deepest one fills the others.
    """
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "three", layers=3, context=CONTEXT))
    folders = [write_tiny_handoff(tmp_path / str(depth), checkpoint, depth=depth) for depth in depths]
    handoffs = [HandoffBundle.open(folder, checkpoint) for folder in folders]
    handoff = max((each for each in handoffs if each.depth <= prefill_layers), key=lambda each: each.depth)
    decoder = Decoder.load(checkpoint, torch.float32, WIDTH)
    prompt = LONG[:100]
    expected = ByHand(decoder, handoff, prefill_layers).decode(prompt, len(prompt) - EXACT_LAST, 12)
    harness = EngineHarness(checkpoint, decoder, 100, handoffs)

    async def play() -> None:
        running = asyncio.create_task(harness.engine.run())
        device, exact = Device(harness, 1, prompt, prefill_layers=prefill_layers), Device(harness, 2, prompt)
        await device.open()
        await exact.open()
        device.send()
        await exact.ask()
        await device.receive()
        await device.ask(expected[len(device.tokens) : 106])
        assert device.session is not None
        harness.engine._sessions.drop_cache(device.session)
        while len(device.tokens) < len(expected):
            await device.ask()
        await exact.ask(extend=10)
        for _ in range(10):
            await exact.receive()
        harness.engine.drain()
        await running
        assert device.tokens == expected
        assert exact.tokens == plain(decoder, prompt, 12)

    asyncio.run(play())
    assert harness.count("state_positions_total", kind="filled") == 2 * (len(prompt) - EXACT_LAST - EXACT_FIRST)


@pytest.mark.parametrize(("prefill_layers", "words"), [(2, "2 layers of a prompt, expected 1 to 1, or 0 for all")])
def test_prefill_layers_that_no_fill_allows_are_refused(scenario: Scenario, prefill_layers: int, words: str) -> None:
    async def play(harness: EngineHarness) -> None:
        with pytest.raises(InvalidInput, match=words):
            await Device(harness, 1, LONG[:100], prefill_layers=prefill_layers).open()

    scenario(play)


def test_without_a_handoff_no_layer_can_be_skipped(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def play() -> None:
        with pytest.raises(InvalidInput, match="no handoff bundle is held here"):
            await Device(EngineHarness(checkpoint, decoder, 100), 1, LONG[:100], prefill_layers=1).open()

    asyncio.run(play())


def test_results_that_depend_on_threads_are_computed_by_one_thread(
    checkpoint: Checkpoint, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(decoder: Decoder) -> None:
        if torch.get_num_threads() > 1:
            raise ServiceError("other bits")

    monkeypatch.setattr(native, "check_batch_invariance", check)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        EngineHarness(checkpoint, decoder, 100).engine.warm_up()
        assert torch.get_num_threads() == 1 and "computing with one thread" in caplog.text
    finally:
        torch.set_num_threads(threads)


def test_results_that_depend_on_the_batch_with_one_thread_end_the_service(
    checkpoint: Checkpoint, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(decoder: Decoder) -> None:
        raise ServiceError("other bits")

    monkeypatch.setattr(native, "check_batch_invariance", check)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(ServiceError, match="other bits"):
            EngineHarness(checkpoint, decoder, 100).engine.warm_up()
    finally:
        torch.set_num_threads(threads)
