"""The cloud's decoder against transformers; a row's bits depend only on the tokens of its own session."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.batch_invariance import chunks, run_tokens
from isthmus.models.language.torch.decoder import (
    DTYPES,
    PAGE_TOKENS,
    WIDTH,
    Decoder,
    Span,
    attention_groups,
    padded_tokens,
)
from isthmus.models.language.torch.kv_cache import KVCache
from tests.bench.tiny_llama import write_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tied": False, "kv_heads": 4},
    "llama of one key-value head": {"kv_heads": 1, "head_dim": 6},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": MISTRAL,
    "mistral with a window": {**MISTRAL, "sliding_window": 256},
    "qwen2": {"kind": "qwen2", "tied": False},
    "qwen3": {"kind": "qwen3", "head_dim": 32},
}
TEXT = (
    "The isthmus of Corinth joins the Peloponnese to the mainland of Greece. In antiquity ships were dragged across it"
    " on a paved road; today a narrow canal of six kilometres cuts through the rock."
)
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
COMMITTED = 2 * PAGE_TOKENS + 40  # tokens of a session in the tests of batch invariance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3, tied=False))


@pytest.fixture(scope="module", params=DTYPES)
def decoder(request: pytest.FixtureRequest, tiny: Checkpoint) -> Decoder:
    return Decoder.load(tiny, DTYPES[request.param])


def random_ids(count: int, seed: int = 0, vocab: int = 259) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def reference(transformers: Any, ids: list[int], *place: Any, **options: Any) -> Tensor:
    """Logits (len(ids), vocab) of transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(*place, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        logits_NV: Tensor = model(torch.tensor([ids])).logits[0]
    return logits_NV


def feed(decoder: Decoder, cache: KVCache, ids: list[int]) -> Tensor:
    """Logits (len(ids), vocab) after tokens appended to `cache`, `width` a forward pass."""
    logits = []
    for start in range(0, len(ids), decoder.width):
        block = ids[start : start + decoder.width]
        x_NH = decoder.forward(decoder.embed(block), [Span(cache, cache.length, len(block))])
        logits.append(decoder.logits(x_NH)[: len(block)])
    return torch.cat(logits)


# Against transformers


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(transformers: Any, tmp_path: Path, name: str) -> None:
    folder, ids = write_tiny_llama(tmp_path / "tiny", seed=3, **MODELS[name]), random_ids(PAGE_TOKENS + 40)
    found = run_tokens(Decoder.load(Checkpoint.open(folder), torch.float32), ids, chunks(len(ids), WIDTH))
    expected = reference(transformers, ids, folder)
    assert found.dtype == torch.float32 and expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_smollm2_equals_transformers(transformers: Any) -> None:
    """Their code and our tensors, which test_checkpoint compares one by one with theirs."""
    checkpoint = Checkpoint.open("smollm2")
    ids = checkpoint.tokenizer.encode(TEXT)[:40]
    assert len(ids) == 40
    found = run_tokens(Decoder.load(checkpoint, torch.float32), ids, chunks(40, WIDTH))
    config = transformers.LlamaConfig(**SMOLLM2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: torch.from_numpy(checkpoint.tensor(name)) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_bfloat16_agrees_roughly(tiny: Checkpoint) -> None:
    ids = random_ids(100)
    exact = run_tokens(Decoder.load(tiny, torch.float32), ids, chunks(100, WIDTH))
    rough = run_tokens(Decoder.load(tiny), ids, chunks(100, WIDTH))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05 * exact.std()
    assert np.corrcoef(rough.flatten(), exact.flatten())[0, 1] > 0.999


# Cuts


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_tail_of_head_is_the_whole(decoder: Decoder, cuts: tuple[int, ...]) -> None:
    parts = [decoder[start:stop] for start, stop in itertools.pairwise(cuts)]
    caches, whole, ids = [part.new_cache() for part in parts], decoder.new_cache(), random_ids(PAGE_TOKENS + 20)
    for start in range(0, len(ids), 9):
        block = ids[start : start + 9]
        x_NH = parts[0].embed(block)
        for part, cache in zip(parts, caches, strict=True):
            x_NH = part.forward(x_NH, [Span(cache, start, len(block))])
        assert torch.equal(x_NH, decoder.forward(decoder.embed(block), [Span(whole, start, len(block))]))
        assert torch.equal(parts[-1].logits(x_NH), decoder.logits(x_NH))
    assert sum(cache.bytes for cache in caches) == whole.bytes > 0
    assert {cache.length for cache in (*caches, whole)} == {len(ids)}


def test_a_cut_leaves_layers_out(decoder: Decoder) -> None:
    x_NH, ids = decoder.embed([1, 2, 3]), 3
    outs = [part.forward(x_NH, [Span(part.new_cache(), 0, ids)]) for part in (decoder, decoder[:2], decoder[2:])]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert [part.layers for part in (decoder, decoder[:2], decoder[2:])] == [range(3), range(2), range(2, 3)]


# Company


@pytest.fixture(scope="module")
def sessions(decoder: Decoder) -> list[tuple[list[int], Tensor, KVCache]]:
    """Three sessions: their tokens, the logits after each in a forward pass of its own, a cache of a prefix.

    The prefixes end before the end of the first page, after it, and before the end of the second.
    """
    made = []
    for seed, held in enumerate((PAGE_TOKENS - 6, 0, 2 * PAGE_TOKENS - 3)):
        ids, cache = random_ids(COMMITTED, seed), decoder.new_cache()
        if held:
            feed(decoder, cache, ids[:held])
        made.append((ids, run_tokens(decoder, ids, [1] * COMMITTED), cache))
    return made


wants = st.tuples(st.integers(0, 2), st.integers(1, WIDTH), st.booleans())  # session, tokens, whether these are wrong
passes = st.lists(st.lists(wants, min_size=1, max_size=3, unique_by=lambda want: want[0]), min_size=1, max_size=8)


@settings(max_examples=40)
@given(plan=passes)
def test_rows_do_not_depend_on_company(
    decoder: Decoder, sessions: list[tuple[list[int], Tensor, KVCache]], plan: list[list[tuple[int, int, bool]]]
) -> None:
    """Any partition of tokens into passes, beside any others, with wrong tokens that are rolled back: the same bits."""
    caches = [copy.deepcopy(cache) for _, _, cache in sessions]
    for wanted in plan:
        ids, spans, wrong_starts = [], [], {}
        for name, count, wrong in wanted:
            start = caches[name].length
            block = sessions[name][0][start : start + min(count, WIDTH - len(ids))]
            if block:
                ids += [(id + 1) % 259 for id in block] if wrong else block
                spans.append((name, Span(caches[name], start, len(block))))
            if wrong:
                wrong_starts[name] = start
        logits_NV = decoder.logits(decoder.forward(decoder.embed(ids), [span for _, span in spans]))
        row = 0
        for name, span in spans:
            if name in wrong_starts:
                assert span.cache.length == span.start + span.count
                span.cache.truncate(span.start)
            else:
                expected = sessions[name][1][span.start : span.start + span.count]
                assert torch.equal(logits_NV[row : row + span.count], expected)
            row += span.count


def test_rollback_is_never_having_had_them(decoder: Decoder) -> None:
    """Also when the forgotten tokens reached into the next page."""
    ids, other, cache = random_ids(PAGE_TOKENS + 30), random_ids(40, seed=9), decoder.new_cache()
    feed(decoder, cache, ids[: PAGE_TOKENS - 4])
    wrong = feed(decoder, cache, other)
    cache.truncate(PAGE_TOKENS - 9)
    after = feed(decoder, cache, ids[PAGE_TOKENS - 9 :])
    never = feed(decoder, decoder.new_cache(), ids)
    assert torch.equal(after, never[PAGE_TOKENS - 9 :])
    assert not torch.equal(wrong[:20], never[PAGE_TOKENS - 4 : PAGE_TOKENS + 16])


def test_earlier_tokens_count(decoder: Decoder) -> None:
    """Equal bits would also hold for a decoder that forgets; a token more than a page back must count."""
    ids = random_ids(PAGE_TOKENS + 10)
    changed = [(ids[0] + 1) % 259, *ids[1:]]
    last = [feed(decoder, decoder.new_cache(), each)[-1] for each in (ids, changed)]
    assert not torch.equal(*last)


# Context


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [
        (0, 100, 0),
        (1, 100, PAGE_TOKENS),
        (PAGE_TOKENS, 100, PAGE_TOKENS),
        (PAGE_TOKENS + 1, 100, 100),
        (100, 100, 100),
        (PAGE_TOKENS + 1, 8192, 2 * PAGE_TOKENS),
        (1, 20, 20),
        (101, 100, 101),
        (8193, 8192, 8193),
    ],
)
def test_padded_tokens(tokens: int, context: int, expected: int) -> None:
    assert padded_tokens(tokens, context) == expected


def test_rows_are_grouped_by_the_pages_that_they_read(decoder: Decoder) -> None:
    """A span is cut at the end of each page; a row attends to itself and to earlier rows."""
    start, context = PAGE_TOKENS - 3, 2 * PAGE_TOKENS + 2
    groups = attention_groups(Span(decoder.new_cache(), start, PAGE_TOKENS + 5), context)
    assert [(group.count, group.tokens) for group in groups] == [(3, 64), (64, 128), (2, 130)]
    position = start
    for group in groups:
        assert group.mask_N11T.shape == (group.count, 1, 1, group.tokens)
        for mask_T in group.mask_N11T[:, 0, 0]:
            assert mask_T.nonzero().flatten().tolist() == list(range(position + 1))
            position += 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("context", [100, 2 * PAGE_TOKENS, 20])
def test_all_of_the_context_and_nothing_beyond(tmp_path: Path, context: int) -> None:
    """A context need not be a multiple of the page."""
    short = Decoder.load(Checkpoint.open(write_tiny_llama(tmp_path / "short", context=context)), torch.float32)
    long = Decoder.load(Checkpoint.open(write_tiny_llama(tmp_path / "long", context=512)), torch.float32)
    ids, cache, other = random_ids(context), short.new_cache(), short.new_cache()
    found = feed(short, cache, ids)
    torch.testing.assert_close(found, feed(long, long.new_cache(), ids), rtol=0, atol=1e-4)
    for start, count in ((context, 1), (context - 3, 4), (context + 500, 2)):
        with pytest.raises(ValueError, match=f"tokens, the model's context is {context}"):
            short.forward(short.embed([1] * (count + 1)), [Span(other, 0, 1), Span(cache, start, count)])
        assert (cache.length, other.length) == (context, 0)
    cache.truncate(context - 5)
    assert torch.equal(feed(short, cache, ids[-5:]), found[-5:])
