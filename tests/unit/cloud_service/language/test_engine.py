"""Whatever the company, the drafts and the memory, each text is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from isthmus.cloud_service.language import engine as generation
from isthmus.models.errors import Draining, InvalidInput, Overloaded, ServiceError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import choose
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_fill import EXACT_FIRST, EXACT_LAST, KVFill
from isthmus.models.messages import GREEDY, Committed, Round
from isthmus.protos.limits import MAX_ROUNDS
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import (
    CONTEXT,
    WIDTH,
    Device,
    House,
    Scenario,
    plain,
    prompts,
    until,
)


def test_an_extension_streams_tokens_behind_its_round(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        expected = plain(decoder, [5, 6, 7], 8)
        device = Device(house, 1, [5, 6, 7])
        await device.open()
        answers = [await device.ask(expected[3:5], extend=5)]
        answers += [await device.receive() for _ in range(5)]
        assert [answer.extension for answer in answers] == [False] + [True] * 5
        assert [answer.base for answer in answers] == [3, 6, 7, 8, 9, 10]
        assert device.tokens == [*expected, *plain(decoder, expected, 1)[-1:]][: len(device.tokens)]
        assert len(device.tokens) == 11
        await asyncio.sleep(0.05)
        assert device.answers.empty()

    scenario(play)


def test_a_round_ends_an_extension(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        expected = plain(decoder, [5, 6, 7], 100)
        device = Device(house, 1, [5, 6, 7])
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
        assert device.answers.empty()
        await device.ask(expected[len(device.tokens) : len(device.tokens) + 4])
        assert device.tokens == expected[: len(device.tokens)]

    scenario(play)


def test_rounds_behind_a_stale_one_with_an_extension_end_it(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        device = Device(house, 1, [5, 6, 7])
        await device.open()
        assert device.session is not None
        house.decoder.gate.clear()
        for _ in range(2):
            house.generation.add(device.session, Round(9, (1,), extend=50))
        device.send()
        house.decoder.gate.set()
        assert [await device.receive() for _ in range(2)] == [Committed(3), Committed(3)]
        last = await device.receive()
        assert (last.base, last.extension) == (3, False)
        house.generation.add(device.session, Round(9, (1,), extend=3))
        assert await device.receive() == Committed(4)
        assert [(await device.receive()).extension for _ in range(3)] == [True] * 3
        assert device.tokens == plain(decoder, [5, 6, 7], 4)

    scenario(play)


def test_rounds_ahead_are_answered_in_order(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        expected = plain(decoder, [9, 8], 12)
        device = Device(house, 1, [9, 8])
        await device.open()
        assert device.session is not None
        drafts = [tuple(expected[2:5]), tuple(expected[5:8]), tuple(expected[8:10])]
        for base, draft in zip((2, 5, 8), drafts, strict=True):
            house.generation.add(device.session, Round(base, draft))
        answers = [await device.receive(draft) for draft in drafts]
        assert [(answer.base, answer.accepted) for answer in answers] == [(2, 3), (5, 3), (8, 2)]
        assert device.tokens == expected[:11]

    scenario(play)


def test_a_device_that_leaves_in_the_midst_of_a_round_harms_nobody(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        leaver, stayer = Device(house, 1, list(range(10, 50))), Device(house, 2, [7, 8, 9])
        await leaver.open()
        await stayer.open()
        house.decoder.gate.clear()
        leaver.send([1, 2, 3])
        stayer.send()
        await until(lambda: house.decoder.inside)
        leaver.leave()
        house.decoder.gate.set()
        await stayer.receive()
        await stayer.ask(extend=10)
        for _ in range(10):
            await stayer.receive()
        assert stayer.tokens == plain(decoder, [7, 8, 9], 12)
        assert leaver.answers.empty()
        await leaver.open(start=40)
        await leaver.ask()
        assert leaver.tokens == plain(decoder, list(range(10, 50)), 1)

    scenario(play)


def test_too_many_waiting_rounds_are_refused_and_the_others_answered(scenario: Scenario) -> None:
    async def play(house: House) -> None:
        device = Device(house, 1, [5, 6, 7])
        await device.open()
        for _ in range(MAX_ROUNDS):
            device.send()
        with pytest.raises(Overloaded, match=f"{MAX_ROUNDS} rounds"):
            device.send()
        answers = [await device.receive() for _ in range(MAX_ROUNDS)]
        assert [answer.base for answer in answers] == [3] * MAX_ROUNDS
        assert len(device.tokens) == 3 + MAX_ROUNDS

    scenario(play)


def test_a_failing_pass_is_told_to_everyone_in_it_and_the_next_one_works(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        devices = [Device(house, number, [7, 8, 9 + number]) for number in range(3)]
        for device in devices:
            await device.open()
            await device.ask()
        house.decoder.failure = RuntimeError("a kernel broke")
        house.decoder.gate.clear()
        for device in devices:
            device.send([1, 2])
        house.decoder.gate.set()
        for device in devices:
            with pytest.raises(ServiceError, match="the pass failed"):
                await device.receive()
        house.decoder.failure = None
        for number, device in enumerate(devices):
            await device.ask()
            assert device.tokens == plain(decoder, [7, 8, 9 + number], 2)

    scenario(play)


def test_draining_tells_every_device_and_ends(scenario: Scenario) -> None:
    async def play(house: House) -> None:
        devices = [Device(house, number, [7, 8, 9]) for number in range(3)]
        for device in devices:
            await device.open()
        devices[0].leave()
        house.decoder.gate.clear()
        devices[1].send(extend=100)
        await until(lambda: house.decoder.inside)
        late = asyncio.create_task(Device(house, 5, [1, 2]).open())
        await asyncio.sleep(0)
        house.generation.drain()
        house.decoder.gate.set()
        for device in devices[1:]:
            with pytest.raises(Draining):
                await device.receive()
        with pytest.raises(Draining):
            devices[2].send()
        with pytest.raises(Draining):
            await late
        assert devices[0].answers.empty()

    assert len(scenario(play).decoder.rows) == 1


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_none_follows_the_last_answer_of_a_device_that_ended(scenario: Scenario, rounds: int) -> None:
    async def play(house: House) -> None:
        device = Device(house, 1, [7, 8, 9])
        await device.open()
        house.decoder.gate.clear()
        for _ in range(rounds):
            device.send(extend=4)
        assert device.session is not None
        house.generation.end(device.session)
        house.decoder.gate.set()
        answers = []
        while (answer := await device.answers.get()) is not None:
            answers.append(answer)
        assert len(answers) == rounds + (4 if rounds else 0)

    scenario(play)


def test_log_probabilities_come_with_each_token(scenario: Scenario, decoder: Decoder) -> None:
    async def play(house: House) -> None:
        expected = plain(decoder, [5, 6, 7], 8)
        device = Device(house, 1, [5, 6, 7])
        await device.open(logprobs=2)
        committed = await device.ask(expected[3:6])
        assert len(committed.logprobs) == 4
        for row, id_ in zip(committed.logprobs, expected[3:7], strict=True):
            assert row.top[0] == (id_, row.own)  # greedy: the likeliest

    scenario(play)


def test_info_names_the_model_and_its_numerics(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def play() -> None:
        info = House(checkpoint, decoder, 1).generation.info
        assert (info.name, info.vocab, info.context, info.numerics) == ("tiny", 259, CONTEXT, f"float32/{WIDTH}")
        assert info.fingerprint == checkpoint.fingerprint

    asyncio.run(play())


def test_warm_up_proves_the_rows(checkpoint: Checkpoint, decoder: Decoder, tmp_path: Path) -> None:
    async def play() -> None:
        house = House(checkpoint, decoder, 1)
        house.generation.warm_up()
        forward = decoder.forward
        house.decoder.forward = lambda x_NH, spans: forward(x_NH, spans) + float(len(spans))  # type: ignore[method-assign]
        with pytest.raises(ServiceError, match="other bits in other company"):
            house.generation.warm_up()

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
    """Beside a prompt that goes through all of them, and with its state evicted in between.

    Of several bundles that one guesses which has seen the most layers.
    """
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "three", layers=3, context=CONTEXT))
    folders = [write_tiny_handoff(tmp_path / str(depth), checkpoint, depth=depth) for depth in depths]
    handoffs = [HandoffBundle.open(folder, checkpoint) for folder in folders]
    handoff = max((each for each in handoffs if each.depth <= prefill_layers), key=lambda each: each.depth)
    decoder = Decoder.load(checkpoint, torch.float32, WIDTH)
    prompt = LONG[:100]
    expected = ByHand(decoder, handoff, prefill_layers).decode(prompt, len(prompt) - EXACT_LAST, 12)
    house = House(checkpoint, decoder, 100, handoffs)

    async def play() -> None:
        running = asyncio.create_task(house.generation.run())
        device, exact = Device(house, 1, prompt, prefill_layers=prefill_layers), Device(house, 2, prompt)
        await device.open()
        await exact.open()
        device.send()
        await exact.ask()
        await device.receive()
        await device.ask(expected[len(device.tokens) : 106])
        assert device.session is not None
        house.generation._sessions.forget_state(device.session)
        while len(device.tokens) < len(expected):
            await device.ask()
        await exact.ask(extend=10)
        for _ in range(10):
            await exact.receive()
        house.generation.drain()
        await running
        assert device.tokens == expected
        assert exact.tokens == plain(decoder, prompt, 12)

    asyncio.run(play())
    assert house.count("state_positions_total", kind="filled") == 2 * (len(prompt) - EXACT_LAST - EXACT_FIRST)


@pytest.mark.parametrize(("prefill_layers", "words"), [(2, "2 layers of a prompt, expected 1 to 1, or 0 for all")])
def test_layers_that_cannot_be_kept_are_refused(scenario: Scenario, prefill_layers: int, words: str) -> None:
    async def play(house: House) -> None:
        with pytest.raises(InvalidInput, match=words):
            await Device(house, 1, LONG[:100], prefill_layers=prefill_layers).open()

    scenario(play)


def test_without_a_handoff_no_layer_can_be_skipped(checkpoint: Checkpoint, decoder: Decoder) -> None:
    async def play() -> None:
        with pytest.raises(InvalidInput, match="no hand-off bundle is held here"):
            await Device(House(checkpoint, decoder, 100), 1, LONG[:100], prefill_layers=1).open()

    asyncio.run(play())


def test_rows_that_threads_give_other_bits_are_computed_by_one(
    checkpoint: Checkpoint, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(decoder: Decoder) -> None:
        if torch.get_num_threads() > 1:
            raise ServiceError("other bits")

    monkeypatch.setattr(generation, "check_batch_invariance", check)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        House(checkpoint, decoder, 100).generation.warm_up()
        assert torch.get_num_threads() == 1 and "computing with one thread" in caplog.text
    finally:
        torch.set_num_threads(threads)


def test_bits_that_differ_with_one_thread_too_end_the_service(
    checkpoint: Checkpoint, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(decoder: Decoder) -> None:
        raise ServiceError("other bits")

    monkeypatch.setattr(generation, "check_batch_invariance", check)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(ServiceError, match="other bits"):
            House(checkpoint, decoder, 100).generation.warm_up()
    finally:
        torch.set_num_threads(threads)
