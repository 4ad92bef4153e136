"""The local model shared by answers: calls in order of arrival, a KV cache for each answer, and the same tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge_agent.language import local_model as module
from isthmus.edge_agent.language.local_model import KV_CACHES, Cache, FairLock, LocalModel
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import AnswerCancelled, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.language.packing import Floats
from isthmus.models.messages import GREEDY, Processed
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff

CONTEXT = 64
TEXT = list(range(65, 91))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3, scale=0.3))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", checkpoint)


def local_model(checkpoint: Checkpoint) -> LocalModel:
    return LocalModel(OnnxDecoder(checkpoint, CONTEXT, threads=1), None, SpeculationStats())


def alike(found_V: Floats, expected_V: Floats) -> bool:
    """Of the same text: which tokens were run together may round an activation to another of 256 steps."""
    return bool(np.abs(found_V - expected_V).max() < 0.2 * expected_V.std())


def test_logits_are_those_of_the_decoder(checkpoint: Checkpoint) -> None:
    session = local_model(checkpoint).session()
    for length in (5, 6, 4, 20):
        expected_V = OnnxDecoder(checkpoint, CONTEXT, threads=1).extend(TEXT[:length])
        assert alike(session.logits(TEXT[:length]), expected_V)
    with pytest.raises(InvalidInput, match="holds at most 64"):
        session.logits([65] * (CONTEXT + 1))
    assert session.next([65] * (CONTEXT + 1), GREEDY) is None


def test_answers_that_take_turns_do_not_read_their_texts_again(checkpoint: Checkpoint) -> None:
    model = local_model(checkpoint)
    sessions = [model.session() for _ in range(KV_CACHES)]
    texts = [TEXT[index : index + 10] for index in range(KV_CACHES)]
    for length in range(5, 10):
        for session, text in zip(sessions, texts, strict=True):
            session.logits(text[:length])
            assert model.cache_for(session, text).decoder.length == length
    decoders = [model.cache_for(session, []).decoder for session in sessions]
    assert len(set(map(id, decoders))) == KV_CACHES
    assert [decoder.ids for decoder in decoders] == [text[:9] for text in texts]


def test_more_answers_than_caches_still_say_what_they_say_alone(checkpoint: Checkpoint) -> None:
    model = local_model(checkpoint)
    sessions = [model.session() for _ in range(KV_CACHES + 2)]
    for length in (6, 7):
        for index, session in enumerate(sessions):
            text = TEXT[index : index + length]
            expected_V = OnnxDecoder(checkpoint, CONTEXT, threads=1).extend(text)
            assert alike(session.logits(text), expected_V)


def test_the_next_turn_finds_the_cache_of_the_last(checkpoint: Checkpoint) -> None:
    model = local_model(checkpoint)
    first, other = model.session(), model.session()
    first.logits(TEXT[:12])
    other.logits([200, 201, 202])
    first.close()
    other.close()
    turn = model.session()
    cache = model.cache_for(turn, [*TEXT[:12], 1, 2])
    assert cache.decoder.ids == TEXT[:12]


def test_one_answer_after_the_other_needs_one_cache(checkpoint: Checkpoint) -> None:
    model = local_model(checkpoint)
    caches = set()
    for start in range(6):
        session = model.session()
        session.logits(TEXT[start : start + 5])
        caches.add(id(model.cache_for(session, []).decoder))
        session.close()
    assert len(caches) == 1


def test_only_single_tokens_say_what_a_token_takes(checkpoint: Checkpoint) -> None:
    stats = SpeculationStats()
    session = LocalModel(OnnxDecoder(checkpoint, CONTEXT, threads=1), None, stats).session()
    unknown_s = stats.draft_s.value
    session.logits(TEXT[:10])
    assert stats.draft_s.value == unknown_s
    session.logits(TEXT[:11])
    assert stats.draft_s.value != unknown_s


def test_what_a_session_processed_is_counted(checkpoint: Checkpoint, bundle: Path) -> None:
    config = checkpoint.config
    session = local_model(checkpoint).session()
    for length in (10, 10, 12):  # a text that was read is not read again
        session.logits(TEXT[:length])
    flops = decoder_flops(config, 0, 12, layers=config.layers, decided=2)
    assert session.processed == Processed(12, flops)
    handoff = HandoffBundle.open(bundle, checkpoint)
    decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1, cuts=handoff.depths)
    exits = ExitingDecoder(handoff, checkpoint, decoder, threads=1)
    lower = LocalModel(decoder, exits, SpeculationStats()).session()
    lower.exit(TEXT[:12], 0.0)
    assert lower.processed.tokens == 12 and 0 < lower.processed.flops < 2 * flops


def test_warm_up_leaves_no_text_behind(checkpoint: Checkpoint) -> None:
    stats = SpeculationStats()
    model = LocalModel(OnnxDecoder(checkpoint, CONTEXT, threads=1), None, stats)
    unknown_s = stats.draft_s.value
    model.warm_up(3)
    assert model.cache_for(model.session(), []).decoder.length == 0 and stats.draft_s.value != unknown_s


def test_a_long_text_is_read_in_pieces_and_others_have_their_turn_between_them(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other answer arrives while the first piece is read."""
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    model, order = local_model(checkpoint), list[tuple[str, int]]()
    long, short = model.session(), model.session()
    extend = OnnxDecoder.extend

    def recording(decoder: OnnxDecoder, ids: list[int]) -> Floats:
        order.append(("long" if ids[0] in text else "short", len(ids)))
        if len(order) == 1:
            other.append(threads.submit(short.logits, [200, 201]))
            while not model.lock._waiting:
                pass
        return extend(decoder, ids)

    text, other = list(range(60, 110)), list[Any]()
    monkeypatch.setattr(OnnxDecoder, "extend", recording)
    with ThreadPoolExecutor(1) as threads:
        found_V = long.logits(text)
        other[0].result(10)
    assert order == [("long", 16), ("short", 2), ("long", 16), ("long", 16), ("long", 2)]
    assert alike(found_V, extend(OnnxDecoder(checkpoint, CONTEXT, threads=1), text))


def test_a_text_whose_cache_is_taken_between_pieces_is_read_to_its_end(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    model = LocalModel(OnnxDecoder(checkpoint, CONTEXT, threads=1), None, SpeculationStats(), caches=1)
    session, thief, sizes = model.session(), model.session(), list[int]()

    def read(cache: Cache, part: list[int]) -> None:
        sizes.append(len(part))
        cache.draft.logits(part)
        if len(part) < 50:  # between two pieces, another answer takes the only cache
            model.cache_for(thief, [200]).draft.logits([200])

    session._read(list(range(60, 110)), read)  # type: ignore[arg-type]
    assert sizes == [16, 50]


def test_an_answer_that_was_given_up_does_not_read_on(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    cancelled, model, sizes = threading.Event(), local_model(checkpoint), list[int]()
    extend = OnnxDecoder.extend

    def leaving(decoder: OnnxDecoder, ids: list[int]) -> Floats:
        sizes.append(len(ids))
        cancelled.set()
        return extend(decoder, ids)

    monkeypatch.setattr(OnnxDecoder, "extend", leaving)
    with pytest.raises(AnswerCancelled):
        model.session(cancelled).logits(list(range(60, 110)))
    assert sizes == [16]


def test_exits_follow_the_text_that_is_named(checkpoint: Checkpoint, bundle: Path) -> None:
    handoff = HandoffBundle.open(bundle, checkpoint)

    def exiting() -> LocalModel:
        decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1, cuts=handoff.depths)
        return LocalModel(decoder, ExitingDecoder(handoff, checkpoint, decoder, 1), SpeculationStats())

    model, alone = exiting(), exiting().session()
    one, other = model.session(), model.session()
    expected = alone.exit(TEXT[:10], 2.0)
    expected_NH = alone.hidden_states(TEXT[:10], 2)
    one.exit(TEXT[:10], 2.0)
    other.exit(TEXT[5:12], 2.0)
    found = one.exit(TEXT[:10], 2.0)
    np.testing.assert_allclose(found.logits_V, expected.logits_V, atol=1e-4)
    np.testing.assert_allclose(one.hidden_states(TEXT[:10], 2), expected_NH, atol=1e-4)
    np.testing.assert_array_equal(one.embed(TEXT[:3]), alone.embed(TEXT[:3]))


def test_a_lock_is_handed_over_in_order_of_arrival() -> None:
    """A thread that takes it again at once waits behind those that came before."""
    lock, order = FairLock(), list[str]()
    waits = [threading.Event() for _ in range(3)]

    def take(name: str, arrived: threading.Event) -> None:
        arrived.set()
        with lock:
            order.append(name)

    with ThreadPoolExecutor(3) as threads:
        with lock:
            for name, arrived in zip("abc", waits, strict=True):
                threads.submit(take, name, arrived)
                arrived.wait(10)
                while len(lock._waiting) < "abc".index(name) + 1:
                    pass
        with lock:
            order.append("first again")
    assert order == ["a", "b", "c", "first again"]


def test_short_turns_that_wait_for_a_long_one_go_before_the_next_long_one() -> None:
    """Each round of them is followed by a long turn: the short one that comes again waits for it."""
    lock, order = FairLock(), list[str]()

    def take(name: str, again: bool = False) -> None:
        with lock.turn(long=name.isupper()):
            order.append(name)
            if again:
                arrive("z")

    def arrive(name: str, again: bool = False) -> None:
        expected = len(lock._waiting) + 1
        turns.append(threads.submit(take, name, again))
        while len(lock._waiting) < expected:
            pass

    turns: list[Any] = []
    with ThreadPoolExecutor(8) as threads:
        with lock.turn(long=True):
            for name in "ABxCy":
                arrive(name, again=name == "x")
        for turn in turns:
            turn.result(10)
    assert order == ["x", "y", "A", "z", "B", "C"]


def test_an_interrupted_wait_gives_its_turn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FairLock()

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with lock:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Event, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lock.__enter__()
        assert not lock._waiting
    with lock:
        pass


def test_a_turn_that_comes_with_the_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FairLock()
    lock.__enter__()

    def handed_over(self: threading.Event, timeout: float | None = None) -> bool:
        lock.__exit__()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", handed_over)
        with pytest.raises(KeyboardInterrupt):
            lock.__enter__()
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: lock.__enter__() or lock.__exit__() or "free").result(10) == "free"
