from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.batch_invariance import chunks, run_tokens
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.recipes.language.llama import LayerCache, Llama
from tests.bench.tiny_llama import write_tiny_llama

KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"kind": "qwen2"}, "qwen3": {"kind": "qwen3", "head_dim": 32}}
LITTLE = 1e-3  # of the mean square
IDS = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    return Checkpoint.open(write_tiny_llama(folder, **KINDS[request.param]))


def through(
    model: Llama, ids_BT: torch.Tensor, caches: list[LayerCache | None], starts_B: torch.Tensor | None = None
) -> Any:
    x_BTH = model.embed(ids_BT)
    for index, layer in enumerate(model.layers):
        x_BTH, caches[index] = layer(x_BTH, caches[index], starts_B)
    return model.logits(x_BTH)


def test_logits_are_those_of_the_serving_decoder(checkpoint: Checkpoint) -> None:
    model, decoder = Llama.load(checkpoint, torch.float32), Decoder.load(checkpoint, torch.float32)
    logits_BTV = through(model, IDS, [None] * len(model.layers))
    for ids_T, logits_TV in zip(IDS, logits_BTV, strict=True):
        torch.testing.assert_close(logits_TV, run_tokens(decoder, ids_T.tolist(), chunks(20, 16)), atol=2e-4, rtol=1e-4)


def test_a_cache_and_padding_change_nothing(checkpoint: Checkpoint) -> None:
    model = Llama.load(checkpoint, torch.float32)
    whole_BTV, caches = through(model, IDS, [None] * len(model.layers)), [None] * len(model.layers)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), IDS], 1)
    starts_B, parts = torch.full((3,), 4), []
    for part in (padded[:, :10], padded[:, 10:11], padded[:, 11:]):
        parts.append(through(model, part, caches, starts_B))
    torch.testing.assert_close(torch.cat(parts, 1)[:, 4:], whole_BTV, atol=1e-4, rtol=1e-4)


def test_hidden_states_are_float32_between_layers_of_another_type(checkpoint: Checkpoint) -> None:
    """As in the service, whose own hidden states must equal those that a device sends."""
    model, decoder = Llama.load(checkpoint, torch.bfloat16), Decoder.load(checkpoint, torch.bfloat16)
    x_BTH, spans = model.embed(IDS[:1, :16]), [Span(decoder.new_cache(), 0, 16)]
    for layer in model.layers:
        x_BTH, _ = layer(x_BTH)
        assert x_BTH.dtype == torch.float32
    served_NH = decoder.forward(decoder.embed(IDS[0, :16].tolist()), spans)[:16]
    assert (x_BTH[0] - served_NH).square().mean() < LITTLE * served_NH.square().mean()
