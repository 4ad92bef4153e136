from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import own_answers, own_data
from isthmus.models.recipes.vision.cutting import capture
from isthmus.models.recipes.vision.own_model import Detection
from isthmus.models.recipes.vision.own_split import OwnSplit
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Fit, Preprocessing
from isthmus.models.vision.outputs import finish
from isthmus.models.vision.tail import open_tail
from tests.unit.models.recipes.vision.own_kinds import SIDE, detector, embedder, segmenter, write_photos

Factory = Callable[[], nn.Module]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("own") / "photos")


def split_of(factory: Factory, photos: Path, kind: str, *, cuts: tuple[str, ...] = (), labels: int = 0) -> OwnSplit:
    fit: Fit = "letterbox" if kind == "detect" else "crop"
    spec = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5,) * 3, deviation=(0.5,) * 3, fit=fit)
    captured = capture(factory(), (3, SIDE, SIDE), "embed" if kind == "embed" else None)
    assert captured.kind == kind
    named = [f"thing {index}" for index in range(labels)]
    return OwnSplit(captured, own_data.find(photos), spec, cuts, named, Detection(min_score=0.5))


@pytest.mark.parametrize(
    ("factory", "kind", "labels"),
    [(detector, "detect", 2), (segmenter, "segment", 3), (embedder, "embed", 0)],
    ids=["detector", "segmenter", "embedder"],
)
def test_a_network_that_answers_no_class_becomes_a_bundle(
    factory: Factory, kind: str, labels: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_answers, "STEPS", 1)
    monkeypatch.setattr(own_answers, "LEAST_EPOCHS", 1)
    split = split_of(factory, photos, kind, labels=labels)
    assert any(line.startswith(">") for line in split.table())
    bundle, notes = split.make(tmp_path / "bundle", Run(tmp_path / "work", 0), "test", {"name": "own", "licence": "?"})
    (task,) = bundle.manifest.tasks
    assert task.kind == kind and len(task.labels) == labels
    assert any(f"({kind})" in line for line in notes.lines)
    assert all(0 <= rate.agreement <= 1 for rate in bundle.manifest.taps[0].widths[0].rates)
    assert bundle.manifest.images[-1].form == "png" and bundle.manifest.images[-1].agreement > 0.999
    check_both_ends(bundle, factory(), photos)


def check_both_ends(bundle: Bundle, net: nn.Module, photos: Path) -> None:
    """Whole photos get the network's own answer, and payloads one of the same shape."""
    (task,), spec = bundle.manifest.tasks, bundle.manifest.preprocessing
    image_3HW = preprocess(Image.open(photos / "0.png").convert("RGB"), spec)
    tail, head, codec = open_tail(bundle), Head(bundle, 1), bundle.codec(0)
    with torch.inference_mode():
        wanted = net(torch.from_numpy(image_3HW)[None])
    whole = tail.images_to_tasks([image_3HW], (0,))[0]
    assert not isinstance(whole, np.ndarray)
    for own, given in zip(whole.values(), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        np.testing.assert_allclose(own, given, atol=1e-3)
    features_CHW, exit_ = head.segment(0, image_3HW)
    assert exit_ is None
    rate, payload = codec.compress(head.encode(0, features_CHW, 0), 0)
    latent_CHW = codec.dequantise(codec.decode(payload, rate), rate)
    sent = tail.latents_to_tasks(0, [latent_CHW], [rate], (0,))[0]
    assert not isinstance(sent, np.ndarray)
    finish(task, {name: batch[0] for name, batch in sent.items()}, spec.crop)


def test_the_cut_is_where_the_fewest_bytes_cross_for_the_same_harm(photos: Path) -> None:
    split = split_of(detector, photos, "detect")
    measured = own_answers.proposed(split.captured, own_answers.images_of(split.data, split.spec)["train"], split.spec)
    least = min(measured.values())
    assert measured[split.chosen[0]] <= own_answers.NEAR * least
    shares = {cut.name: cut.macs / split.captured.macs for cut in split.captured.cuts}
    assert all(shares[name] <= own_answers.SHARE for name in measured)


def test_the_wrong_number_of_labels_is_one_error(photos: Path, tmp_path: Path) -> None:
    split = split_of(detector, photos, "detect", cuts=("stem",), labels=3)
    with pytest.raises(InvalidInput, match="3 labels were given, the model answers 2"):
        split.make(tmp_path / "bundle", Run(tmp_path, 0), "test", {"name": "own", "licence": "?"})
    assert not (tmp_path / "bundle").exists()
