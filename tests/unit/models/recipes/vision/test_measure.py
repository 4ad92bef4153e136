from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.vision.calibrate import Answers, calibrate
from isthmus.models.recipes.vision.measure import IMAGE_WAYS, Measurements, Samples, measure
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies
from isthmus.models.vision.images import encode_whole
from tests.unit.models.recipes.vision.conftest import LABELS, random_samples


def test_figures_of_rates_are_those_of_real_payloads(bundle: Bundle, measured: Measurements) -> None:
    for tap, found in zip(bundle.manifest.taps, measured.taps, strict=True):
        for width, bytes_RN in zip(tap.widths, found.bytes_WRN, strict=True):
            for rate, sizes_N in zip(width.rates, bytes_RN, strict=True):
                assert (rate.mean_bytes, rate.max_bytes) == (float(sizes_N.mean()), int(sizes_N.max()))
        assert (np.diff(found.bytes_WRN.mean(2), axis=1) > 0).all()


def test_accuracy_and_agreement_are_counted(bundle: Bundle, measured: Measurements) -> None:
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
    whole = zip(manifest.images, measured.images.first_WNK.argmax(2), strict=True)
    ways += [(image.accuracy, image.agreement, answer_N) for image, answer_N in whole]
    assert len(ways) == 2 * 2 + 2 * 3 + 2 + len(IMAGE_WAYS) and manifest.calibration_samples == 6
    for accuracy, agreement, answer_N in ways:
        assert accuracy == pytest.approx((answer_N == LABELS[0]).mean())
        assert agreement == pytest.approx((answer_N == cloud_N).mean())


def test_every_way_to_answer_gives_probabilities(measured: Measurements) -> None:
    for answers in (*measured.exits.values(), *measured.cloud_TNK, *(tap.first_WRNK for tap in measured.taps)):
        np.testing.assert_allclose(answers.sum(-1), 1, atol=1e-5)
    assert {name: exits_ENK.shape for name, exits_ENK in measured.exits.items()} == {
        "fp32": (2, 6, 2),
        "int8": (2, 6, 2),
    }
    assert [tap.first_WRNK.shape for tap in measured.taps] == [(2, 3, 6, 2), (1, 2, 6, 2)]
    assert [[task.shape for task in tap.others_TNK] for tap in measured.taps] == [[(6, 3)], [(6, 3)]]
    assert [task.shape for task in measured.cloud_TNK] == [(6, 2), (6, 3)]


def test_each_head_has_exits_and_thresholds_of_its_own(bundle: Bundle, measured: Measurements) -> None:
    for precision, head in bundle.manifest.heads.items():
        answers = Answers(measured.exits[precision], LABELS[0], measured.cloud_N)
        assert head.thresholds == calibrate(answers).thresholds and len(head.thresholds) >= 24
        assert head.depends_on == dependencies(bundle.manifest, precision)
    assert not np.array_equal(measured.exits["fp32"], measured.exits["int8"])


def test_scores_are_of_the_test_samples(bundle: Bundle) -> None:
    samples = random_samples(4, seed=2)
    found = measure(bundle, samples, "test")
    scores = bundle.manifest.scores
    assert scores["test cloud accuracy"] == interval(found.cloud_TNK[0].argmax(1) == samples.labels_TN[0])
    assert scores["test light 0.5 rate2 accuracy"] == interval(
        found.taps[0].first_WRNK[0, 2].argmax(1) == samples.labels_TN[0]
    )
    assert scores["test deep colour accuracy"] == interval(
        found.taps[1].others_TNK[0].argmax(1) == samples.labels_TN[1]
    )
    assert {score.samples for score in scores.values()} == {4}


def test_whole_images_are_measured_as_the_files_that_a_device_sends(bundle: Bundle, measured: Measurements) -> None:
    photo = random_samples(6, seed=1).photos[2]()
    sizes = [len(encode_whole(photo, bundle.manifest.preprocessing.resize, *way)) for way in IMAGE_WAYS]
    assert measured.images.bytes_WN[:, 2].tolist() == sizes
    assert [(image.form, image.quality) for image in bundle.manifest.images] == list(IMAGE_WAYS)
    means = [image.mean_bytes for image in bundle.manifest.images]
    assert means == measured.images.bytes_WN.mean(1).tolist() and means[:3] == sorted(means[:3])


def test_without_labels_the_clouds_answers_count(bundle: Bundle) -> None:
    unlabelled = measure(bundle, Samples(random_samples(3, seed=1).photos), "unlabelled")
    assert [labels_N.tolist() for labels_N in unlabelled.labels_TN] == [
        answers_NK.argmax(1).tolist() for answers_NK in unlabelled.cloud_TNK
    ]
