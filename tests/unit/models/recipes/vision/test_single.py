from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import single
from isthmus.models.recipes.vision.bottleneck import new_bottleneck
from isthmus.models.recipes.vision.single import PRICES, SingleRate, tables_of
from isthmus.models.vision.slim import FrozenSlim
from isthmus.models.vision.split import SplitClassifier
from tests.tiny_bundle import SIDE, TINY, laplace_tables

TAP = TINY.taps[0]


@pytest.fixture
def way(tiny_split: SplitClassifier) -> SingleRate:
    torch.manual_seed(0)
    bottleneck = new_bottleneck(
        tiny_split, TAP, tiny_split.tap(0).slim.bottleneck, (1.0,), tiny_split.cuts[-1], settled=True
    )
    tensors = contextual.to_tensors(laplace_tables(TAP.latent_channels, (2.0,)))
    return SingleRate("price 1", bottleneck.eval(), tiny_split, tensors, SIDE)


def test_it_answers_through_real_bytes(way: SingleRate) -> None:
    images = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    payloads = way.encode(images)
    assert [type(data) for data in payloads] == [bytes] * 3
    answers = way.answer(payloads)
    assert answers.shape == (3, 2)
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)


def test_the_encoder_counts_front_bottleneck_and_tables_as_shipped(
    way: SingleRate, tiny_split: SplitClassifier
) -> None:
    state = FrozenSlim(tiny_split.tap(0).slim).state_dict().values()
    assert way.encoder_bits > 8 * sum(tensor.nbytes for tensor in state)
    assert way.encoder_macs > 0


def test_a_trained_price_is_found_with_its_tables(tmp_path: Path, tiny_split: SplitClassifier) -> None:
    for price in PRICES:
        bottleneck = new_bottleneck(
            tiny_split, TAP, tiny_split.tap(0).slim.bottleneck, (price,), tiny_split.cuts[-1], settled=True
        )
        torch.save({"average": bottleneck.state_dict()}, tmp_path / f"ours-single-{price:g}-refine.ckpt")
        tensors = contextual.to_tensors(laplace_tables(TAP.latent_channels, (2.0,)))
        safetensors.numpy.save_file(tensors, tables_of(tmp_path, price))
    found = single.trained(tmp_path, tiny_split, TAP)
    assert [way.setting for way in found] == [f"price {price:g}" for price in PRICES]


def test_missing_training_names_the_command(tmp_path: Path, tiny_split: SplitClassifier) -> None:
    with pytest.raises(InvalidInput, match="python -m isthmus.models.recipes baselines ours-single"):
        single.trained(tmp_path, tiny_split, TAP)
