"""The first token's state is what the whole model makes of it, whatever follows."""

from __future__ import annotations

import pytest
import torch

from models.language.checkpoint import Checkpoint
from models.language.decoder import Decoder, Span
from models.language.first_token import FirstToken
from tests.bench.tiny_llama import write_tiny_llama

DEPTH, IDS = 2, [7, 8, 9]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    return Decoder.load(Checkpoint.open(folder), torch.float32, 4)


def test_its_row_is_the_one_that_the_first_layers_make(decoder: Decoder) -> None:
    first = FirstToken(decoder, DEPTH)
    cache = decoder.new_cache()
    x_NH = decoder[:DEPTH].forward(decoder.embed(IDS), [Span(cache, 0, len(IDS))])
    assert torch.equal(first.row(IDS[0]), x_NH[:1])
    assert torch.equal(first.row(IDS[0]), first.row(IDS[0])) and not torch.equal(first.row(IDS[1]), x_NH[:1])


def test_its_keys_and_values_replace_what_was_guessed(decoder: Decoder) -> None:
    exact, guessed = decoder.new_cache(), decoder.new_cache()
    for cache in (exact, guessed):
        decoder.forward(decoder.embed(IDS), [Span(cache, 0, len(IDS))])
    pair = torch.zeros(len(IDS), decoder.config.kv_heads, decoder.config.head_dim)
    with torch.inference_mode():
        guessed.write(2, 0, pair, pair)
    FirstToken(decoder, DEPTH).write(guessed, IDS[0])
    for found, wanted in zip(guessed.read(2, len(IDS)), exact.read(2, len(IDS)), strict=True):
        assert torch.equal(found[:, :1], wanted[:, :1]) and not found[:, 1:].any()
