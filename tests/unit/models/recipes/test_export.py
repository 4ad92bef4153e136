from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.bundle import Bundle
from models.recipes import export
from models.recipes.calibrate import interval
from tests.conftest import random_samples


@pytest.fixture(scope="module")
def measured(tiny_bundle: Bundle) -> export.Measured:
    """The calibration samples of the tiny bundle, answered again by what it ships."""
    return export.measure(tiny_bundle, random_samples(6, seed=1), "again")


def test_figures_of_rates_are_those_of_real_payloads(tiny_bundle: Bundle, measured: export.Measured) -> None:
    for rate, sizes_N in zip(tiny_bundle.manifest.bottleneck.rates, measured.bytes_RN, strict=True):
        assert (rate.mean_bytes, rate.max_bytes) == (float(sizes_N.mean()), int(sizes_N.max()))
    assert measured.bytes_RN[0].mean() < measured.bytes_RN[1].mean()


def test_accuracy_and_agreement_are_counted(tiny_bundle: Bundle, measured: export.Measured) -> None:
    labels_N, cloud_N = np.arange(6) % 2, measured.cloud_NK.argmax(1)
    ways = [*measured.exits_ENK.argmax(2), *measured.rates_RNK.argmax(2)]
    for figures, answer_N in zip(
        [*tiny_bundle.manifest.exits, *tiny_bundle.manifest.bottleneck.rates], ways, strict=True
    ):
        assert figures.accuracy == pytest.approx((answer_N == labels_N).mean())
        assert figures.agreement == pytest.approx((answer_N == cloud_N).mean())


def test_every_way_to_answer_gives_probabilities(measured: export.Measured) -> None:
    for answers in (measured.exits_ENK, measured.rates_RNK, measured.cloud_NK):
        np.testing.assert_allclose(answers.sum(-1), 1, atol=1e-5)
    assert (measured.exits_ENK.shape, measured.rates_RNK.shape, measured.cloud_NK.shape) == (
        (2, 6, 2),
        (2, 6, 2),
        (6, 2),
    )


def test_scores_are_of_the_test_samples(tiny_bundle: Bundle) -> None:
    samples = random_samples(4, seed=2)
    cloud_N = export.measure(tiny_bundle, samples, "test").cloud_NK.argmax(1)
    assert tiny_bundle.manifest.scores["test cloud accuracy"] == interval(cloud_N == samples.labels_N)
    assert {score.samples for score in tiny_bundle.manifest.scores.values()} == {4}


def test_shapes_in_the_manifest_are_those_of_the_network(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert [s.output for s in manifest.segments] == [(16, 32, 32), (40, 8, 8)]
    assert manifest.bottleneck.latent == (4, 8, 8)


def test_multiplications_are_counted_as_by_hand() -> None:
    assert export.macs(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 4, 4)) == 3 * 8 * 9 * 16


def test_the_head_is_the_cheaper_part(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert min(manifest.tail_macs, manifest.bottleneck.encoder_macs, *(s.macs for s in manifest.segments)) > 0


def test_matrices_are_halved_in_the_network_too() -> None:
    """What is measured is what is stored: the network is rounded in place."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    stored = export.halve_weights(layer)  # type: ignore[arg-type]
    assert (stored["weight"].dtype, stored["bias"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(layer.weight, stored["weight"].float())


def test_the_manifest_says_with_what_it_was_made(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.manifest.training.versions.keys() == set(export.VERSIONS)
