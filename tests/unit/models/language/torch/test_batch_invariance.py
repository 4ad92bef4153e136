"""The check passes on this machine, and fails for a decoder whose rows influence each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.models.errors import ServiceError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch import decoder as decoders
from isthmus.models.language.torch.batch_invariance import check_batch_invariance, chunks, run_tokens
from isthmus.models.language.torch.decoder import DTYPES, PAGE_TOKENS, WIDTH, Decoder
from tests.bench.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module", params=DTYPES)
def decoder(request: pytest.FixtureRequest, tiny: Checkpoint) -> Decoder:
    return Decoder.load(tiny, DTYPES[request.param])


@pytest.mark.parametrize("width", [1, 2, 5, WIDTH, 33])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_passes(tiny: Checkpoint, width: int, dtype: torch.dtype) -> None:
    check_batch_invariance(Decoder.load(tiny, dtype, width))


def test_fails_when_rows_are_mixed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    product = decoders.Linear.__call__
    monkeypatch.setattr(decoders.Linear, "__call__", lambda self, x_NI: product(self, x_NI) + x_NI.mean())
    with pytest.raises(ServiceError, match="verification needs --width 1"):
        check_batch_invariance(decoder)


@pytest.mark.parametrize("rows", [7, WIDTH])  # of a mixed batch, of a block
def test_fails_when_attention_depends_on_the_batch(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    attention = decoders.F.scaled_dot_product_attention

    def sloppy(q_NKGD: Tensor, *others: Any, **options: Any) -> Tensor:
        mixed: Tensor = attention(q_NKGD, *others, **options)
        return mixed * (1 + 2**-6 * (len(q_NKGD) == rows))

    monkeypatch.setattr(decoders.F, "scaled_dot_product_attention", sloppy)
    with pytest.raises(ServiceError, match="results on this machine depend on the batch"):
        check_batch_invariance(decoder)


@pytest.mark.timeout(30)
def test_passes_with_a_short_context(tmp_path: Path) -> None:
    check_batch_invariance(
        Decoder.load(Checkpoint.open(write_tiny_llama(tmp_path, context=PAGE_TOKENS // 2)), torch.float32)
    )


@pytest.mark.parametrize(("total", "size", "counts"), [(0, 4, []), (3, 4, [3]), (8, 4, [4, 4]), (9, 4, [4, 4, 1])])
def test_chunks(total: int, size: int, counts: list[int]) -> None:
    assert chunks(total, size) == counts


def test_tokens_of_another_sequence_take_a_row_and_change_nothing(decoder: Decoder) -> None:
    ids, counts = list(range(3, 13)), [4, 3, 3]
    alone_TV = run_tokens(decoder, ids, counts)
    assert alone_TV.shape == (10, decoder.config.vocab)
    assert torch.equal(run_tokens(decoder, ids, counts, other_ids=[7, 8, 9]), alone_TV)
