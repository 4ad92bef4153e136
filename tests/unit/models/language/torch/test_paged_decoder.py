"""A decoder over fixed memory, on the CPU: the same answers as `Decoder`, no bit of them from other rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.models.errors import ServiceError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch import kv_fill, paged_decoder
from isthmus.models.language.torch.batch_invariance import check_batch_invariance, chunks, run_tokens
from isthmus.models.language.torch.decoder import DTYPES, WIDTH, Decoder, Span
from isthmus.models.language.torch.kv_cache import GROWTH_TOKENS
from isthmus.models.language.torch.kv_pool import KVPool
from isthmus.models.language.torch.paged_decoder import PagedDecoder, Pass, record_graph, record_nothing
from isthmus.models.torch_device import CPU
from tests.bench.tiny_llama import write_tiny_llama
from tests.one_device import META, OneDevice, without_pinning

CONTEXT = 3 * GROWTH_TOKENS - 40
IDS = torch.randint(259, (CONTEXT,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in chunks of one block, so that the tiny context has three: passes of one, two and three chunks."""
    monkeypatch.setattr(paged_decoder, "CHUNK_TOKENS", GROWTH_TOKENS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operators: threads that wait for each other take longer than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3, tied=False, context=CONTEXT))


class Recorder:
    """A pass that was recorded reads and writes the same memory every time, and gives the same tensor, as a graph."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Pass) -> Pass:
        self.recorded += 1
        out_NH = run()

        def replay() -> torch.Tensor:
            self.replayed += 1
            return out_NH.copy_(run())

        return replay


def paged(decoder: Decoder, record: Any = record_nothing, contexts: int = 3) -> PagedDecoder:
    budget_bytes = contexts * decoder.new_cache().bytes_for(CONTEXT)
    return PagedDecoder(decoder, KVPool(decoder.config, decoder.dtype, CPU, budget_bytes), record)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_equal_those_of_the_other_decoder(tmp_path: Path, kind: str) -> None:
    """Over all of the context, with a session beside it in most passes."""
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "tiny", kind=kind, context=CONTEXT))
    decoder, counts = Decoder.load(checkpoint, torch.float32), chunks(CONTEXT, 15)
    expected = run_tokens(decoder, IDS, counts)
    found = run_tokens(paged(decoder), IDS, counts, IDS[::-1])
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [1, 5, WIDTH])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_is_batch_invariant(tiny: Checkpoint, dtype: torch.dtype, width: int) -> None:
    decoder = paged(Decoder.load(tiny, dtype, width))
    assert decoder.far_positions == [GROWTH_TOKENS, 2 * GROWTH_TOKENS]
    check_batch_invariance(decoder)


def test_the_check_sees_a_pass_of_more_chunks_that_computes_otherwise(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, decoder = paged_decoder.attend_in_chunks, paged(Decoder.load(tiny, torch.float32))

    def sloppy(q_NHD: torch.Tensor, pool: KVPool, parts: Any, masks: Any) -> torch.Tensor:
        return attend(q_NHD, pool, parts, masks) * (1 + 2**-12 * (len(parts) == 3))

    monkeypatch.setattr(paged_decoder, "attend_in_chunks", sloppy)
    with pytest.raises(ServiceError, match="results on this machine depend on the batch"):
        check_batch_invariance(decoder)


def test_a_pass_is_recorded_once_for_each_number_of_chunks(tiny: Checkpoint) -> None:
    recorder, decoder = Recorder(), Decoder.load(tiny, torch.float32)
    recorded = paged(decoder, recorder)
    counts = chunks(CONTEXT, WIDTH)
    found = run_tokens(recorded, IDS, counts)
    assert (recorder.recorded, recorder.replayed) == (3, len(counts))
    assert torch.equal(found, run_tokens(paged(decoder), IDS, counts))


def test_a_result_outlives_the_next_pass(tiny: Checkpoint) -> None:
    decoder = paged(Decoder.load(tiny, torch.float32), Recorder())
    cache = decoder.new_cache()
    first_NH = decoder.forward(decoder.embed([1, 2]), [Span(cache, 0, 2)])
    kept_NH = first_NH.clone()
    decoder.forward(decoder.embed([3]), [Span(cache, 2, 1)])
    assert torch.equal(first_NH, kept_NH)


def test_tail_of_head_is_the_whole(tiny: Checkpoint) -> None:
    decoder = paged(Decoder.load(tiny, torch.float32))
    parts, whole = [decoder[:1], decoder[1:]], decoder.new_cache()
    caches = [part.new_cache() for part in parts]
    for start in range(0, GROWTH_TOKENS + 20, 12):
        block, x_NH = IDS[start : start + 12], decoder.embed(IDS[start : start + 12])
        expected_NH = decoder.forward(x_NH, [Span(whole, start, len(block))])
        for part, cache in zip(parts, caches, strict=True):
            x_NH = part.forward(x_NH, [Span(cache, start, len(block))])
        assert torch.equal(x_NH, expected_NH)
    assert sum(cache.bytes for cache in caches) == whole.bytes


def test_rollback_and_another_sessions_blocks_leave_no_trace(tiny: Checkpoint) -> None:
    """A session that failed may have left what is not finite."""
    decoder = paged(Decoder.load(tiny, torch.float32), contexts=1)
    spoiled = decoder.new_cache()
    spoiled.reserve(CONTEXT)
    for layer in range(3):
        spoiled.write(layer, 0, *torch.full((2, CONTEXT, decoder.config.kv_heads, decoder.config.head_dim), torch.nan))
    del spoiled
    expected = run_tokens(decoder, IDS[:300], chunks(300, WIDTH))
    cache = decoder.new_cache()
    for start in range(0, 280, 10):
        decoder.forward(decoder.embed(IDS[start : start + 10]), [Span(cache, start, 10)])
    decoder.forward(decoder.embed([7] * WIDTH), [Span(cache, 280, WIDTH)])
    cache.truncate(250)
    rest = [
        decoder.logits(decoder.forward(decoder.embed([IDS[place]]), [Span(cache, place, 1)]))[0]
        for place in range(250, 260)
    ]
    assert torch.equal(torch.stack(rest), expected[250:260])


def test_beyond_the_context_nothing_changes(tiny: Checkpoint) -> None:
    decoder = paged(Decoder.load(tiny, torch.float32))
    cache = decoder.new_cache()
    with pytest.raises(ValueError, match=f"the model's context is {CONTEXT}"):
        decoder.forward(decoder.embed([1, 2]), [Span(cache, CONTEXT - 1, 2)])
    assert cache.length == 0


def test_far_positions_fit_into_the_pool(tiny: Checkpoint) -> None:
    decoder = Decoder.load(tiny, torch.float32)
    step_bytes = decoder.new_cache().bytes_for(1)
    for steps, far in ((1, []), (2, [256]), (3, [256, 512])):
        pool = KVPool(decoder.config, decoder.dtype, CPU, steps * step_bytes)
        assert PagedDecoder(decoder, pool, record_nothing).far_positions == far


def test_on_a_device_nothing_is_computed_with_what_is_elsewhere(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states may come from the host."""
    without_pinning(monkeypatch)
    monkeypatch.setattr(kv_fill, "download", lambda tensor: np.zeros(tensor.shape, np.float32))
    loaded = Decoder.load(tiny, torch.bfloat16, WIDTH, META)
    decoder = PagedDecoder(loaded, KVPool(loaded.config, loaded.dtype, META, 4 << 20), record_nothing)
    size, upper = decoder.config, decoder[1:]
    outputs = 2 * size.kv_heads * size.head_dim
    weight_LOH, bias_LO = np.zeros((2, outputs, size.hidden), np.float32), np.zeros((2, outputs), np.float32)
    fill, cache, filled = kv_fill.KVFill(weight_LOH, bias_LO, upper), decoder.new_cache(), upper.new_cache()
    with OneDevice():
        x_NH = decoder.forward(decoder.embed(IDS[:10]), [Span(cache, 0, 10)])
        x_NH = decoder.forward(torch.zeros(WIDTH, size.hidden), [Span(cache, 10, 10)])
        logits_NV = decoder.logits(x_NH)
        fill.write(filled, 0, torch.zeros(WIDTH + 5, size.hidden))
        fill.write(filled, WIDTH + 5, x_NH[:3])
    assert {x_NH.device, logits_NV.device} == {META} and logits_NV.shape == (WIDTH, size.vocab)
    assert filled.length == WIDTH + 8


def test_where_cuda_records_nothing_kernels_are_launched_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run: Pass, memory: object) -> Pass:
        raise failure

    monkeypatch.setattr(paged_decoder, "replaying", fail)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    failure: RuntimeError = RuntimeError("operation not permitted when stream is capturing\nmore")
    device = torch.device("cuda", 0)

    def run() -> torch.Tensor:
        return torch.zeros(1)

    with caplog.at_level(logging.WARNING):
        assert record_graph(device, (0, 0), run) is run
    (message,) = caplog.messages
    assert message == (
        "a forward pass cannot be recorded on cuda:0 and is launched kernel by kernel:"
        " operation not permitted when stream is capturing"
    )
    failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        record_graph(device, (0, 0), run)
