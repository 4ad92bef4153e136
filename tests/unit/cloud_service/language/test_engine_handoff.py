"""Tokens decided from hidden states are those that the upper layers decide one by one, whatever the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.cloud_service.language.handoff_sequence import MAX_FILLED_STATES
from isthmus.models.errors import (
    ContextGone,
    Draining,
    InvalidInput,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    ServiceError,
    UnknownBundle,
)
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import choose, logprobs
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_LAST, KVFill
from isthmus.models.messages import GREEDY, Committed, Round, Sampling
from isthmus.protos.limits import MAX_ROUNDS
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import (
    CONTEXT,
    SAMPLED,
    WIDTH,
    Device,
    EngineHarness,
    Scenario,
    StateDevice,
    embedded,
    head_rows,
    plain,
    prompts,
    states_of,
    until,
)

PROMPT = prompts(1, longest=60, seed=4)[0]
NewDevice = Callable[..., StateDevice]


@pytest.fixture
def new_device(decoder: Decoder, handoff: HandoffBundle) -> NewDevice:
    """`new_device(house, name, prompt, **settings)`."""

    def build(harness: EngineHarness, name: int = 1, prompt: Sequence[int] = PROMPT, **settings: Any) -> StateDevice:
        return StateDevice(harness, decoder, handoff, name, prompt, **settings)

    return build


@dataclass
class ByHand:
    """The layers after the cut, one state at a time."""

    decoder: Decoder
    handoff: HandoffBundle
    rate: int = 1
    context_rate: int = 0
    fill: bool = False

    def __post_init__(self) -> None:
        self.tail = self.decoder[self.handoff.depth :]
        self.cache = self.tail.new_cache()
        self._fill = KVFill(*self.handoff.kv_fill(), self.tail)

    def take(self, tokens: Sequence[int], asked: bool = True) -> Any:
        """Logits (vocab,) after `tokens`; those in the cache are not computed again."""
        start = self.cache.length
        exact = asked * (1 if start else EXACT_LAST)
        rates = [self.context_rate] * (len(tokens) - start - asked) + [self.rate] * asked
        decided = {len(tokens) - 1} if asked else set()
        payloads = states_of(self.decoder, self.handoff, tokens, start, self.context_rate, self.rate, decided)
        for index, (payload, rate) in enumerate(zip(payloads, rates, strict=True)):
            if not self.cache.length:  # the cloud computes it itself, and never fills it in
                row_1H = torch.from_numpy(head_rows(self.decoder, self.handoff.depth, tokens[:1]))
            else:
                around = tokens[start + index - 1 : start + index + 1]
                row_1H = torch.from_numpy(
                    self.handoff.state_codec.decode([payload], embedded(self.decoder, around), rate)
                )
            if self.cache.length and self.fill and index < len(payloads) - exact:
                self._fill.write(self.cache, self.cache.length, row_1H)
                continue
            x_NH = torch.zeros(self.decoder.width, self.decoder.config.hidden)
            x_NH[0] = row_1H[0]
            x_NH = self.tail.forward(x_NH, [Span(self.cache, self.cache.length, 1)])
        return self.tail.logits(x_NH)[0].numpy() if asked else None


def same_state(session: Any, expected: KVCache) -> bool:
    found, layers = session.sequence.cache, session.runner.decoder.layers
    assert found.length == expected.length
    pairs = [(found.read(layer, found.length), expected.read(layer, found.length)) for layer in layers]
    return all(torch.equal(ours, theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True))


@pytest.mark.parametrize("fill", [False, True], ids=["exact", "fill"])
@pytest.mark.parametrize("rate", [0, 1])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_cloud_decides_what_its_layers_decide(
    scenario: Scenario,
    new_device: NewDevice,
    decoder: Decoder,
    handoff: HandoffBundle,
    fill: bool,
    rate: int,
    sampling: Sampling,
) -> None:
    """A prompt in two rounds, tokens that the device skips, and a token each time that it asks."""

    async def play(harness: EngineHarness) -> None:
        device = new_device(harness, sampling=sampling, rate=rate, context_rate=1 - rate, fill=fill)
        expected = ByHand(decoder, handoff, rate, 1 - rate, fill)
        await device.open(logprobs=2)
        device.tokens = PROMPT[:20]
        answer = await device.ask(0, extend=0)
        assert (answer.base, answer.accepted, answer.tokens, answer.passes) == (0, 0, (), 1 if fill else 3)
        expected.take(device.tokens, asked=False)
        device.tokens = list(PROMPT)
        base = 20
        for own in ((), (9, 8, 7), (), (100,)):
            device.tokens += own
            logits_V = expected.take(device.tokens)
            position = len(device.tokens)
            answer = await device.ask(base)
            token = choose(logits_V, sampling, position)
            assert (answer.base, answer.accepted, answer.tokens) == (base, 0, (token,))
            assert (answer.logprobs[0].own, answer.logprobs[0].top) == logprobs(logits_V, token, 2)
            assert device.session is not None and same_state(device.session, expected.cache)
            base = position

    scenario(play)


def test_states_at_their_finest_nearly_are_the_models_own(
    scenario: Scenario, new_device: NewDevice, decoder: Decoder
) -> None:
    """Most tokens are those of the whole model, though the hidden states went through the codec."""

    async def play(harness: EngineHarness) -> None:
        same = 0
        for number, prompt in enumerate(prompts(10, seed=6)):
            device = new_device(harness, number, prompt)
            await device.open()
            answer = await device.ask(0)
            same += answer.tokens == tuple(plain(decoder, prompt, 1)[len(prompt) :])
        assert same >= 7

    scenario(play)


async def converse(device: StateDevice, logprobs: int = 3) -> list[Committed]:
    """Rounds of all sizes; the cloud's replies."""
    events, base, rng = [], 0, np.random.default_rng(len(device.tokens))
    await device.open(logprobs=logprobs)
    for _ in range(6):
        events.append(replace(await device.ask(base, int(rng.random() < 0.8)), queue_s=0, compute_s=0, passes=0))
        base = len(device.tokens) - len(events[-1].tokens)
        device.tokens += rng.integers(3, 259, int(rng.integers(not events[-1].tokens, 5))).tolist()
    return events


def test_bits_do_not_depend_on_the_batch(scenario: Scenario, new_device: NewDevice, decoder: Decoder) -> None:
    """Log probabilities too are those of a session alone, beside others of states and of tokens."""
    asked = prompts(6, seed=8)
    alone: list[list[Committed]] = []

    async def one_by_one(harness: EngineHarness) -> None:
        for number, prompt in enumerate(asked):
            alone.append(await converse(new_device(harness, number, prompt, fill=number % 2 == 0)))

    async def together(harness: EngineHarness) -> None:
        ordinary = [Device(harness, 100 + number, prompt) for number, prompt in enumerate(prompts(5, seed=9))]
        expected = [plain(decoder, device.tokens, 30) for device in ordinary]
        devices = [new_device(harness, number, prompt, fill=number % 2 == 0) for number, prompt in enumerate(asked)]
        for each in ordinary:
            await each.open()
        writing = [
            each.write(sequence, np.random.default_rng(1)) for each, sequence in zip(ordinary, expected, strict=True)
        ]
        found = await asyncio.gather(*map(converse, devices), *writing)
        assert found[: len(devices)] == alone
        assert all(each.tokens[: len(sequence)] == sequence for each, sequence in zip(ordinary, expected, strict=True))

    scenario(one_by_one)
    harness = scenario(together)
    assert {0, 1} == set(harness.decoder.depths)


def test_neither_kind_of_step_starves_the_other(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        writers = [Device(harness, 100 + number, [7, 8, 9 + number]) for number in range(3 * WIDTH)]
        device = new_device(harness, prompt=PROMPT * 3)
        await device.open()
        for writer in writers:
            await writer.open()
            writer.send(extend=200)
        await asyncio.gather(*(writer.receive() for writer in writers))
        await device.ask(0)
        before = len(harness.decoder.rows)
        await device.ask(len(device.tokens) - 1)
        assert len(harness.decoder.rows) - before <= 6
        assert sum(harness.decoder.depths[before:]) == 1

    scenario(play)


def test_a_fill_handles_a_long_prompt_without_a_forward_pass(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness, prompt=(PROMPT * 9)[:200], fill=True)
        await device.open()
        await device.ask(0, extend=0)
        assert harness.decoder.rows == [1, 1], "of the first token, through the lower layers and the others"
        await device.ask(200 - MAX_FILLED_STATES - 5)
        assert harness.decoder.rows == [1, 1, 1]

    harness = scenario(play)
    assert harness.count("state_positions_total", kind="filled") == 200 + MAX_FILLED_STATES + 4
    assert harness.count("state_positions_total", kind="run") == 1
    assert [harness.count("state_rounds_total", kind=kind) for kind in ("decided", "kept")] == [1, 1]
    assert harness.count("decoder_rows_total", kind="used") == 1
    assert harness.count("tokens_committed_total") == 1
    assert harness.count("draft_tokens_total", result="rejected") == 0


def test_a_round_replaces_the_tokens_from_its_base(
    scenario: Scenario, new_device: NewDevice, decoder: Decoder, handoff: HandoffBundle
) -> None:
    """Sent again, overlapping, and different from the middle on: the device defines the tokens."""

    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        first = await device.ask(0)
        device.tokens.pop()
        again = await device.ask(len(PROMPT) - 1)
        assert again.tokens == first.tokens
        await device.ask(len(PROMPT) - 7)
        for prefill_layers in (12, 0):
            device.tokens = [*PROMPT[:prefill_layers], 50, 60, 70]
            expected = ByHand(decoder, handoff)
            logits_V = expected.take(device.tokens)
            assert (await device.ask(prefill_layers)).tokens == (int(logits_V.argmax()),)
            assert device.session is not None and same_state(device.session, expected.cache)
            assert device.session.sequence.tokens == device.tokens[:-1]

    scenario(play)


def test_rounds_ahead_are_answered_in_order(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        harness.decoder.gate.clear()
        for base, stop in ((0, 10), (10, 20), (20, 21)):
            device.tokens = PROMPT[:stop]
            device.send(base, int(stop != 20))
        harness.decoder.gate.set()
        events = [await device.receive() for _ in range(3)]
        assert [(answer.base, len(answer.tokens)) for answer in events] == [(0, 1), (10, 0), (20, 1)]

    scenario(play)


def test_what_is_not_held_is_gone_once_and_opened_again(scenario: Scenario, new_device: NewDevice) -> None:
    """Rounds after the lost one are dropped until the device has opened again."""

    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        for base in (5, 6, 7):
            device.send(base)
        with pytest.raises(ContextGone, match="the first 5 tokens of this session are not held here"):
            await device.receive()
        device.send(8)
        await device.open()
        answer = await device.ask(0)
        assert (answer.base, answer.held) == (0, 0)
        await asyncio.sleep(0.02)
        assert device.events.empty()

    scenario(play)


def test_an_evicted_state_is_gone_and_the_device_brings_it_again(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device, other = new_device(harness, prompt=PROMPT[:30]), Device(harness, 2, [4] * 10)
        await device.open()
        first = await device.ask(0)
        await other.open()
        await other.ask()
        assert harness.count("context_evictions_total", reason="budget") == 1
        with pytest.raises(ContextGone):
            await device.ask(30)
        device.tokens = PROMPT[:30]
        await device.open()
        assert (await device.ask(0)).tokens == first.tokens

    scenario(play, pages=1)


def test_an_evicted_state_needs_no_opening_when_a_round_brings_all(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device, other = new_device(harness, prompt=PROMPT[:30]), Device(harness, 2, [4] * 10)
        await device.open()
        first = await device.ask(0)
        await other.open()
        await other.ask()
        device.tokens.pop()
        assert (await device.ask(0)).tokens == first.tokens

    scenario(play, pages=1)


@pytest.mark.parametrize("fill", [False, True], ids=["exact", "fill"])
def test_sessions_that_evict_each_other_all_finish(scenario: Scenario, new_device: NewDevice, fill: bool) -> None:
    async def write(device: StateDevice) -> None:
        count, base = len(device.tokens), -1
        while len(device.tokens) < count + 12:
            try:
                if base < 0:
                    await device.open()
                    base = 0
                answer = await device.ask(base)
                base = len(device.tokens) - len(answer.tokens)
            except ContextGone:
                base = -1

    async def play(harness: EngineHarness) -> None:
        devices = [new_device(harness, number, prompt, fill=fill) for number, prompt in enumerate(prompts(5, 50, 3))]
        expected = []
        for device in devices:
            twin = new_device(harness, 50, device.tokens, fill=fill)
            await write(twin)
            expected.append(twin.tokens)
            twin.leave()
        ordinary = Device(harness, 99, [5, 6, 7])
        await ordinary.open()
        ordinary.send(extend=100)
        await asyncio.gather(*map(write, devices))
        if not fill:  # which positions were decided in the cloud depends on what had to be sent again
            assert [device.tokens for device in devices] == expected

    harness = scenario(play, pages=2)
    assert harness.count("context_evictions_total", reason="budget") > 0


def test_memory_is_that_of_the_layers_after_the_cut(
    scenario: Scenario, new_device: NewDevice, decoder: Decoder
) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        await device.ask(0)
        assert harness.count("contexts_bytes") == decoder.new_cache().bytes_for(len(PROMPT)) / 2

    scenario(play)


def test_a_device_that_comes_back_brings_only_what_is_new(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        first = await device.ask(0)
        device.leave()
        device.rate = 0  # the link has become worse
        await device.open(start=len(PROMPT))
        assert (await device.ask(len(PROMPT))).held == len(PROMPT)
        device.leave()
        device.rate, device.tokens = 1, PROMPT[:]
        await device.open(start=len(PROMPT) - 3)
        again = await device.ask(len(PROMPT) - 3)
        assert (again.held, again.tokens) == (len(PROMPT) - 3, first.tokens)
        assert (await device.ask(len(PROMPT))).held == 0

    scenario(play)


def test_only_a_compatible_session_reuses_the_cache(
    scenario: Scenario, new_device: NewDevice, handoff: HandoffBundle
) -> None:
    async def play(harness: EngineHarness) -> None:
        device, ordinary = new_device(harness), Device(harness, 1, PROMPT)
        await device.open()
        await device.ask(0)
        device.tokens.pop()
        with pytest.raises(ContextGone):
            await device.open(start=10, prefill_layers=handoff.depth)
        with pytest.raises(ContextGone):
            await ordinary.open(start=10)
        with pytest.raises(ContextGone):
            await device.open(start=10, crc32=1)
        await ordinary.open()
        assert (await ordinary.ask()).held == 0
        with pytest.raises(ContextGone, match="opened again elsewhere"):
            await device.receive()
        with pytest.raises(ContextGone):
            await device.open(start=10)
        await device.open()
        assert (await device.ask(0)).held == 0

    scenario(play)


def test_a_corrupt_state_fails_its_own_round_alone(scenario: Scenario, new_device: NewDevice) -> None:
    """What was before it and beside it is unchanged; the device goes on from the base of that round."""

    async def play(harness: EngineHarness) -> None:
        device, other = new_device(harness), new_device(harness, 2, PROMPT[::-1])
        expected = new_device(harness, 3)
        for each in (device, other, expected):
            await each.open()
            await each.ask(0)
        harness.decoder.gate.clear()
        blocker = Device(harness, 4, [5, 6, 7])
        await blocker.open()
        blocker.send()
        await until(lambda: harness.decoder.inside)
        for each in (device, other, expected):
            each.tokens += range(10, 10 + WIDTH + 4)
        good = device.round(len(PROMPT))
        for position, bad in ((0, b"\xff" * 100), (WIDTH + 2, b"\x01\x00"), (3, b"\x00")):
            states = list(good.states)
            states[position] = bad
            device.put(replace(good, states=tuple(states)))
        device.put(good)
        other.send(len(PROMPT))
        harness.decoder.gate.set()
        for _ in range(3):
            with pytest.raises(PayloadCorrupt):
                await device.receive()
        assert (await other.receive()).base == len(PROMPT)
        assert (await device.receive()).tokens == (await expected.ask(len(PROMPT))).tokens
        await blocker.receive()

    scenario(play)


BAD_ROUNDS: dict[str, tuple[dict[str, Any], type[IsthmusError], str]] = {
    "no states": ({"states": ()}, InvalidInput, "without states in a handoff session"),
    "large state": ({"states": (bytes(161),)}, PayloadTooLarge, "a state has 161 bytes, the handoff's cap is 160"),
    "unknown token": ({"draft": (259,)}, InvalidInput, "vocabulary of 259"),
    "beyond the context": ({"base": CONTEXT}, InvalidInput, "257 tokens, the model's context is 256"),
    "no room for a token": ({"base": CONTEXT - 1, "extend": 1}, InvalidInput, "257 tokens, the model's context is 256"),
}


@pytest.mark.parametrize(("fields", "kind", "words"), BAD_ROUNDS.values(), ids=BAD_ROUNDS.keys())
def test_a_round_that_cannot_be_is_refused_and_the_session_goes_on(
    scenario: Scenario, new_device: NewDevice, fields: dict[str, Any], kind: type[IsthmusError], words: str
) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        await device.ask(0)
        with pytest.raises(kind, match=words):
            device.put(replace(Round(3, (5,), 0, (b"",)), **fields))
        assert len((await device.ask(len(PROMPT))).tokens) == 1

    scenario(play)


def test_the_context_can_be_filled_to_its_end(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness, prompt=(PROMPT * 9)[: CONTEXT - 1])
        await device.open()
        assert len((await device.ask(0)).tokens) == 1
        await device.ask(CONTEXT - 1, extend=0)

    scenario(play)


def test_states_in_a_session_of_tokens_are_refused(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [5, 6, 7])
        await device.open()
        assert device.session is not None
        with pytest.raises(InvalidInput, match="opened without a handoff"):
            harness.engine.add(device.session, Round(3, (5,), 1, (b"",)))
        assert (await device.ask()).base == 3

    scenario(play)


def test_another_handoff_is_refused_with_both_names(
    scenario: Scenario, new_device: NewDevice, handoff: HandoffBundle
) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        with pytest.raises(UnknownBundle, match=f"{b'12345678'.hex()} is not held.* {handoff.fingerprint[:8].hex()}"):
            await device.open(handoff=b"12345678")
        with pytest.raises(InvalidInput, match="rate 2 does not exist, the handoff has rates 0 to 1"):
            await device.open(rate=2)
        await device.open()
        await device.ask(0)

    scenario(play)


def test_a_service_without_a_handoff_says_so(decoder: Decoder, checkpoint: Any, new_device: NewDevice) -> None:
    async def play() -> None:
        harness = EngineHarness(checkpoint, decoder, 1)
        assert harness.engine.info.handoffs == ()
        with pytest.raises(UnknownBundle, match="of this model there is none"):
            await new_device(harness).open()

    asyncio.run(play())


def test_two_handoffs_of_a_model_are_served_side_by_side(tmp_path: Path) -> None:
    """Sessions cut at different layers, and one that moves to the other cut and sends its tokens again."""
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "three", layers=3, context=CONTEXT))
    decoder = Decoder.load(checkpoint, torch.float32, WIDTH)
    folders = [write_tiny_handoff(tmp_path / str(depth), checkpoint, depth=depth) for depth in (1, 2)]
    handoffs = [HandoffBundle.open(folder, checkpoint) for folder in folders]
    harness = EngineHarness(checkpoint, decoder, 100, handoffs)

    def expected(handoff: HandoffBundle, tokens: Sequence[int]) -> int:
        return choose(ByHand(decoder, handoff).take(tokens), GREEDY, len(tokens))

    async def play() -> None:
        running = asyncio.create_task(harness.engine.run())
        devices = [StateDevice(harness, decoder, handoff, name, PROMPT) for name, handoff in enumerate(handoffs)]
        for device in devices:
            await device.open()
            device.send(0)
        for device, handoff in zip(devices, handoffs, strict=True):
            assert (await device.receive()).tokens == (expected(handoff, PROMPT),)
        moved = StateDevice(harness, decoder, handoffs[1], 0, PROMPT)  # the first, by its name
        with pytest.raises(ContextGone):
            await moved.open(start=len(PROMPT))
        await moved.open()
        assert (await moved.ask(0)).tokens == (expected(handoffs[1], PROMPT),)
        harness.engine.drain()
        await running

    asyncio.run(play())
    assert {1, 2} <= set(harness.decoder.depths)


def test_info_names_the_handoff(scenario: Scenario, handoff: HandoffBundle) -> None:
    async def play(harness: EngineHarness) -> None:
        assert harness.engine.info.handoffs == (handoff.fingerprint,)

    scenario(play)


def test_too_many_waiting_rounds_are_refused(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        round_ = device.round(0)
        for _ in range(MAX_ROUNDS):
            device.put(round_)
        with pytest.raises(Overloaded):
            device.put(round_)
        events = [await device.receive() for _ in range(MAX_ROUNDS)]
        assert {answer.tokens for answer in events} == {events[0].tokens}

    scenario(play)


def test_a_failing_step_is_an_error_and_its_cache_is_dropped(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        await device.ask(0)
        harness.decoder.failure = RuntimeError("a kernel broke")
        with pytest.raises(ServiceError, match="the step failed"):
            await device.ask(len(PROMPT))
        harness.decoder.failure = None
        with pytest.raises(ContextGone):
            await device.ask(len(PROMPT))
        await device.open()
        assert (await device.ask(0)).held == 0

    scenario(play)


def test_a_state_that_does_not_fit_is_an_error(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness, prompt=(PROMPT * 9)[:140])
        await device.open()
        with pytest.raises(Overloaded, match="the state of 140 tokens does not fit"):
            await device.ask(0)
        device.tokens = PROMPT[:]
        await device.ask(0)

    scenario(play, pages=1)


@pytest.mark.parametrize("lost", [True, False])
def test_none_follows_the_last_event_of_a_device_that_half_closed(
    scenario: Scenario, new_device: NewDevice, lost: bool
) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        device.send(3 if lost else 0)
        device.send(3)
        assert device.session is not None
        harness.engine.end(device.session)
        events = []
        while (answer := await device.events.get()) is not None:
            events.append(answer)
        assert len(events) == (1 if lost else 2)

    scenario(play)


def test_draining_is_sent_to_the_device(scenario: Scenario, new_device: NewDevice) -> None:
    async def play(harness: EngineHarness) -> None:
        device = new_device(harness)
        await device.open()
        harness.decoder.gate.clear()
        device.send(0)
        await until(lambda: harness.decoder.inside)
        harness.engine.drain()
        harness.decoder.gate.set()
        with pytest.raises(Draining):
            await device.receive()

    scenario(play)


def test_a_device_that_disconnects_during_a_round_comes_back_to_what_was_computed(
    scenario: Scenario, new_device: NewDevice, decoder: Decoder, handoff: HandoffBundle
) -> None:
    async def play(harness: EngineHarness) -> None:
        device, expected = new_device(harness, prompt=PROMPT[: WIDTH + 3]), ByHand(decoder, handoff)
        await device.open()
        harness.decoder.gate.clear()
        device.send(0)
        await until(lambda: harness.decoder.inside)
        device.leave()
        harness.decoder.gate.set()
        await device.open(start=WIDTH)
        logits_V = expected.take(device.tokens)
        answer = await device.ask(WIDTH)
        assert (answer.held, answer.tokens) == (WIDTH, (int(logits_V.argmax()),))

    scenario(play)
