from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import baselines
from isthmus.models.recipes.vision.baselines import SETTINGS, Baseline, new_bottleneck, trained
from isthmus.models.vision.split import SplitClassifier

SIDE = 64


def baseline(method: str, setting: float, split: SplitClassifier) -> Baseline:
    torch.manual_seed(0)
    return Baseline(method, str(setting), new_bottleneck(method, setting, split), SIDE)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(3, 3, SIDE, SIDE) * 2 - 1


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_answers_through_real_bytes(
    method: str, tiny_split: SplitClassifier, images: torch.Tensor
) -> None:
    way = baseline(method, SETTINGS[method][0], tiny_split)
    payloads = way.encode(images)
    assert [type(data) for data in payloads] == [bytes] * 3
    answers = way.answer(payloads)
    assert answers.shape == (3, 2)
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_payload_does_not_depend_on_its_neighbours(
    method: str, tiny_split: SplitClassifier, images: torch.Tensor
) -> None:
    way = baseline(method, SETTINGS[method][0], tiny_split)
    assert len(way.encode(images[1:2])[0]) == pytest.approx(len(way.encode(images)[1]), rel=0.05, abs=8)


def test_the_encoders_size_counts_prior_and_tables(tiny_split: SplitClassifier) -> None:
    way = baseline("entropic-student", 0.1, tiny_split)
    assert way.encoder_bits > 32 * 138_672
    assert way.encoder_bits < 32 * 138_672 * 1.5


def test_eight_bits_are_a_byte_a_value(tiny_split: SplitClassifier, images: torch.Tensor) -> None:
    one, three = (baseline("bq", channels, tiny_split).encode(images)[0] for channels in (1, 3))
    assert (len(three) - 8) == 3 * (len(one) - 8)


@pytest.mark.parametrize("method", SETTINGS)
def test_each_setting_starts_from_the_one_before(tiny_split: SplitClassifier, method: str) -> None:
    first, second = (new_bottleneck(method, setting, tiny_split) for setting in SETTINGS[method][:2])
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    baselines.copy_matching(second, first)
    wanted = first.state_dict()
    kept = {name for name, tensor in second.state_dict().items() if not tensor.equal(wanted[name])}
    assert len(kept) == (2 if method == "bq" else 0), "those that the number of channels shapes"
    assert all(second.state_dict()[name].equal(before[name]) for name in kept)


def test_an_unknown_method_is_named(tiny_split: SplitClassifier) -> None:
    with pytest.raises(InvalidInput, match="'n5' is unknown, expected one of entropic-student, n0"):
        trained(Path("nowhere"), ["n5"], tiny_split)


def test_missing_training_names_the_command(tmp_path: Path, tiny_split: SplitClassifier) -> None:
    with pytest.raises(InvalidInput, match="python -m isthmus.models.recipes baselines n0"):
        trained(tmp_path, ["n0"], tiny_split)


def test_unfinished_training_is_not_taken(tmp_path: Path, tiny_split: SplitClassifier) -> None:
    torch.save({"epoch": 0, "average": {}}, tmp_path / "n0-0.1-joint.ckpt")
    with pytest.raises(InvalidInput, match="not finished"):
        trained(tmp_path, ["n0"], tiny_split)
