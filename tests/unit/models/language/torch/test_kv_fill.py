"""KV fill against plain NumPy, and that a token's bits do not depend on other tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.architecture import rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.packing import Floats
from isthmus.models.language.torch.decoder import DTYPES, PAGE_TOKENS, Decoder, Span
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import KVFill, exact_last, normalised
from tests.bench.tiny_llama import write_tiny_llama

DEPTH, CONTEXT, WIDTH = 1, 100, 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3, context=CONTEXT))


@pytest.fixture(scope="module", params=DTYPES)
def tail(request: pytest.FixtureRequest, tiny: Checkpoint) -> Decoder:
    return Decoder.load(tiny, DTYPES[request.param], WIDTH)[DEPTH:]


def maps(decoder: Decoder, seed: int = 0) -> tuple[Floats, Floats]:
    rng, config = np.random.default_rng(seed), decoder.config
    shape_LO = (len(decoder.layers), 2 * config.kv_heads * config.head_dim)
    weight_LOH = rng.normal(size=(*shape_LO, config.hidden)) / np.sqrt(config.hidden)
    return weight_LOH.astype(np.float32), rng.normal(size=shape_LO).astype(np.float32)


def random_states(count: int, hidden: int, seed: int = 1) -> torch.Tensor:
    """Of very different sizes."""
    rng = np.random.default_rng(seed)
    states_NH = rng.normal(size=(count, hidden)) * np.exp2(rng.integers(-6, 7, (count, 1)))
    return torch.from_numpy(states_NH.astype(np.float32))


def by_hand(decoder: Decoder, layer: int, start: int, states_NH: Floats) -> tuple[Floats, Floats]:
    """Keys and values (kv_heads, N, head_dim) of a layer."""
    config, (weight_LOH, bias_LO) = decoder.config, maps(decoder)
    place = layer - DEPTH
    unit_NH = states_NH / (np.sqrt(np.mean(states_NH**2, axis=1, keepdims=True)) + 1e-6)
    pair_N2KD = (unit_NH @ weight_LOH[place].T + bias_LO[place]).reshape(-1, 2, config.kv_heads, config.head_dim)
    angles_ND2 = (start + np.arange(len(states_NH)))[:, None] * rope_frequencies(config)
    half = config.head_dim // 2
    turned_NKd = (pair_N2KD[:, 0, :, :half] + 1j * pair_N2KD[:, 0, :, half:]) * np.exp(1j * angles_ND2)[:, None]
    keys_NKD = np.concatenate([turned_NKd.real, turned_NKd.imag], axis=-1)
    return keys_NKD.transpose(1, 0, 2), pair_N2KD[:, 1].transpose(1, 0, 2)


def same(one: KVCache, other: KVCache, decoder: Decoder) -> bool:
    pairs = [(one.read(layer, one.length), other.read(layer, one.length)) for layer in decoder.layers]
    return one.length == other.length and all(
        torch.equal(ours, theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("start", [1, 37])
@pytest.mark.parametrize("count", [1, WIDTH, 2 * WIDTH + 3])
def test_keys_and_values_are_those_of_plain_numpy(tail: Decoder, start: int, count: int) -> None:
    states_NH, cache = random_states(count, tail.config.hidden), tail.new_cache()
    KVFill(*maps(tail), tail).write(cache, start, states_NH)
    assert cache.length == start + count
    tolerance = 1e-4 if tail.dtype == torch.float32 else 0.1
    for layer in tail.layers:
        for found, expected in zip(
            cache.read(layer, cache.length), by_hand(tail, layer, start, states_NH.numpy()), strict=True
        ):
            assert found.dtype == tail.dtype
            np.testing.assert_allclose(found[:, start:].float().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("skipped", [0, 1])
def test_the_first_token_is_exact(tail: Decoder, skipped: int) -> None:
    """It goes through all upper layers, including those that other tokens have already been through."""
    states_NH, filled, exact, later = random_states(11, tail.config.hidden), *(tail.new_cache() for _ in range(3))
    fill = KVFill(*maps(tail), tail, skipped)
    for count in (3, 11):  # the second time it is cached
        fill.write(filled, 0, states_NH[:count])
    tail.forward(states_NH[:1].repeat(WIDTH, 1), [Span(exact, 0, 1)])
    KVFill(*maps(tail), tail).write(later, 1, states_NH[1:])
    assert filled.length == 11
    for layer in tail.layers[skipped:]:
        for found, first, others in zip(*(cache.read(layer, 11) for cache in (filled, exact, later)), strict=True):
            assert torch.equal(found[:, :1], first[:, :1]) and torch.equal(found[:, 1:], others[:, 1:])


def test_bits_of_a_token_are_its_own(tail: Decoder) -> None:
    states_NH, fill = random_states(70, tail.config.hidden), KVFill(*maps(tail), tail)
    whole, single, uneven = (tail.new_cache() for _ in range(3))
    fill.write(whole, 0, states_NH)
    for position in range(len(states_NH)):
        fill.write(single, position, states_NH[position : position + 1])
    for start, stop in ((0, 3), (3, 20), (20, 21), (21, 70)):
        fill.write(uneven, start, states_NH[start:stop])
    assert same(whole, single, tail) and same(whole, uneven, tail)


def test_layers_attend_to_what_was_filled(tail: Decoder) -> None:
    """The page of the next token is reserved, and the next token attends to what was written."""
    states_NH, fill = random_states(PAGE_TOKENS, tail.config.hidden), KVFill(*maps(tail), tail)
    outputs, changed = [], states_NH.clone()
    changed[5] += 1
    for before_NH in (states_NH, changed, states_NH):
        cache = tail.new_cache()
        fill.write(cache, 0, before_NH[:-1])
        x_NH = torch.zeros(WIDTH, tail.config.hidden)
        x_NH[0] = states_NH[-1]
        outputs.append(tail.forward(x_NH, [Span(cache, PAGE_TOKENS - 1, 1)])[0])
        assert cache.length == PAGE_TOKENS
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_what_was_there_before_stays(tail: Decoder) -> None:
    states_NH, fill = random_states(20, tail.config.hidden), KVFill(*maps(tail), tail)
    cache, again = tail.new_cache(), tail.new_cache()
    fill.write(cache, 0, states_NH)
    cache.truncate(12)
    fill.write(cache, 12, states_NH[12:])
    fill.write(again, 0, states_NH)
    assert same(cache, again, tail)


def test_nothing_is_written_above_the_context(tail: Decoder) -> None:
    states_NH, fill, cache = random_states(CONTEXT, tail.config.hidden), KVFill(*maps(tail), tail), tail.new_cache()
    fill.write(cache, 0, states_NH[:30])
    with pytest.raises(ValueError, match="101 tokens, the model's context is 100"):
        fill.write(cache, 30, states_NH[:71])
    assert cache.length == 30
    fill.write(cache, 30, states_NH[:70])
    assert cache.length == CONTEXT


def test_longer_prompts_have_more_exact_tokens() -> None:
    assert [exact_last(tokens) for tokens in (1, 255, 256, 511, 512, 2048)] == [16, 16, 16, 16, 32, 128]


def test_hidden_states_are_normalised_by_their_root_mean_square() -> None:
    assert normalised(torch.tensor([[3.0, 4.0, 0.0, 0.0]])).square().mean().item() == pytest.approx(1, abs=1e-5)
