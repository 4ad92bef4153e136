from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.models.errors import BundleError
from isthmus.models.recipes.common.calibrate import certify, interval
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.vision import export
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Task
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tail import widened
from tests.tiny_bundle import GAINS, PREPROCESSING, TAPS, TASKS, TINY, random_images

LABELS = (np.arange(6) % 2, np.arange(6) % 3)


def random_samples(count: int, seed: int) -> export.Samples:
    """Smooth random images with labels of no meaning."""
    return export.Samples(random_images(count, seed), [labels_N[:count] for labels_N in LABELS])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_split: SplitClassifier) -> Bundle:
    """The tiny network, exported and measured as a recipe does it."""
    rng = np.random.default_rng(0)
    taps = []
    for name, built in zip(TAPS, TINY.taps, strict=True):
        gains_RC = np.repeat(np.array(GAINS[: built.rates], np.float32)[:, None], built.latent_channels, 1)
        integers = [rng.laplace(0, gain, (8, built.latent_channels, 8, 8)) for gain in GAINS[: built.rates]]
        tables = fit([np.rint(rate_NCHW).astype(np.int32) for rate_NCHW in integers], gains_RC)
        taps.append(export.TrainedTap(name, tables, 4096))
    trained = export.Trained(
        copy.deepcopy(tiny_split),
        tuple(taps),
        tuple(Task(name=name, labels=labels) for name, labels in TASKS),
        TINY,
        PREPROCESSING,
        random_images(4, seed=3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's ONNX exporter warns of itself and of shapes it takes as constants
        return export.write(
            tmp_path_factory.mktemp("zoo") / "tiny",
            trained,
            about={"name": "tiny", "licence": "none: random weights"},
            training={"command": "tests", "seed": 0, "seconds": 0.0, "data": "none"},
            calibration=random_samples(6, seed=1),
            test=random_samples(4, seed=2),
        )


@pytest.fixture(scope="module")
def measured(bundle: Bundle) -> export.Measured:
    """The calibration samples, answered again by what the bundle ships."""
    return export.measure(bundle, random_samples(6, seed=1), "again")


def test_figures_of_rates_are_those_of_real_payloads(bundle: Bundle, measured: export.Measured) -> None:
    for tap, found in zip(bundle.manifest.taps, measured.taps, strict=True):
        for width, bytes_RN in zip(tap.widths, found.bytes_WRN, strict=True):
            for rate, sizes_N in zip(width.rates, bytes_RN, strict=True):
                assert (rate.mean_bytes, rate.max_bytes) == (float(sizes_N.mean()), int(sizes_N.max()))
        assert (np.diff(found.bytes_WRN.mean(2), axis=1) > 0).all()


def test_accuracy_and_agreement_are_counted(bundle: Bundle, measured: export.Measured) -> None:
    manifest, cloud_N = bundle.manifest, measured.cloud_TNK[0].argmax(1)
    ways: list[tuple[float, float, Sequence[int]]] = [
        (figures.accuracy, figures.agreement, answer_N)
        for precision, head in manifest.heads.items()
        for figures, answer_N in zip(head.exits, measured.exits[precision].argmax(2), strict=True)
    ]
    for tap, found in zip(manifest.taps, measured.taps, strict=True):
        rates = [rate for width in tap.widths for rate in width.rates]
        answers = found.first_WRNK.argmax(3).reshape(len(rates), -1)
        ways += [(r.accuracy, r.agreement, answer_N) for r, answer_N in zip(rates, answers, strict=True)]
    assert len(ways) == 2 * 2 + 2 * 3 + 2
    for accuracy, agreement, answer_N in ways:
        assert accuracy == pytest.approx((answer_N == LABELS[0]).mean())
        assert agreement == pytest.approx((answer_N == cloud_N).mean())


def test_every_way_to_answer_gives_probabilities(measured: export.Measured) -> None:
    for answers in (*measured.exits.values(), *measured.cloud_TNK, *(tap.first_WRNK for tap in measured.taps)):
        np.testing.assert_allclose(answers.sum(-1), 1, atol=1e-5)
    assert {name: exits_ENK.shape for name, exits_ENK in measured.exits.items()} == {
        "fp32": (2, 6, 2),
        "int8": (2, 6, 2),
    }
    assert [tap.first_WRNK.shape for tap in measured.taps] == [(2, 3, 6, 2), (1, 2, 6, 2)]
    assert [[task.shape for task in tap.others_TNK] for tap in measured.taps] == [[(6, 3)], [(6, 3)]]
    assert [task.shape for task in measured.cloud_TNK] == [(6, 2), (6, 3)]


def test_each_head_has_exits_and_thresholds_of_its_own(bundle: Bundle, measured: export.Measured) -> None:
    right_N = measured.cloud_TNK[0].argmax(1) == LABELS[0]
    for precision, head in bundle.manifest.heads.items():
        exits_ENK = measured.exits[precision]
        assert head.thresholds == certify(exits_ENK.max(2), exits_ENK.argmax(2) == LABELS[0], right_N)
    assert not np.array_equal(measured.exits["fp32"], measured.exits["int8"])


def test_scores_are_of_the_test_samples(bundle: Bundle) -> None:
    samples = random_samples(4, seed=2)
    found = export.measure(bundle, samples, "test")
    scores = bundle.manifest.scores
    assert scores["test cloud accuracy"] == interval(found.cloud_TNK[0].argmax(1) == samples.labels_TN[0])
    assert scores["test light 0.5 rate2 accuracy"] == interval(
        found.taps[0].first_WRNK[0, 2].argmax(1) == samples.labels_TN[0]
    )
    assert scores["test deep colour accuracy"] == interval(
        found.taps[1].others_TNK[0].argmax(1) == samples.labels_TN[1]
    )
    assert {score.samples for score in scores.values()} == {4}


def test_shapes_in_the_manifest_are_those_of_the_network(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [s.output for s in manifest.segments] == [(16, 32, 32), (40, 8, 8)]
    assert [tap.latent for tap in manifest.taps] == [(3, 8, 8), (4, 8, 8)]


def test_costs_are_counted(bundle: Bundle) -> None:
    manifest = bundle.manifest
    light, deep = manifest.taps
    assert 0 < light.widths[0].encoder_macs < light.widths[1].encoder_macs
    assert min(*(s.macs for s in manifest.segments), deep.widths[0].encoder_macs) > 0
    assert 0 < manifest.tail_macs < min(light.tail_macs, deep.tail_macs)  # a decoder comes on top


def test_multiplications_are_counted_as_by_hand() -> None:
    assert export.macs(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 4, 4)) == 3 * 8 * 9 * 16


def test_matrices_are_halved_in_the_network_too() -> None:
    """What is measured is what is stored: the network is rounded in place."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    stored = export.halve(layer)  # type: ignore[arg-type]
    assert (stored["weight"].dtype, stored["bias"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(layer.weight, stored["weight"].float())


def test_what_only_the_cloud_runs_is_stored_in_8_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[2] = 0
    before = layer.weight.detach().clone()
    stored = export.halve(layer, {"weight"})  # type: ignore[arg-type]
    assert (stored["weight"].dtype, stored["weight.scale"].shape) == (torch.int8, (4,))
    assert stored["weight"].abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127]
    torch.testing.assert_close(widened(stored)["weight"], layer.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=float(before.abs().max()) / 254)
    with pytest.raises(BundleError, match="lacks a scale"):
        widened({"weight": stored["weight"]})


def test_the_manifest_says_with_what_it_was_made(bundle: Bundle) -> None:
    assert bundle.manifest.training.versions.keys() == set(export.VERSIONS)
