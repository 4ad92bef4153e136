from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import open_tail
from tests.bench import exits
from tests.bench.sc2_photos import Photos

COUNT = 6


@pytest.fixture
def photos() -> Photos:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(COUNT)]
    return Photos(images.__getitem__, np.arange(COUNT) % 2)


@pytest.fixture
def bundle(tiny_bundle: Bundle, photos: Photos, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The tiny bundle with thresholds that all, some and none of the photos reach."""
    head, spec = Head(tiny_bundle), tiny_bundle.manifest.preprocessing
    surest = sorted(head.segment(0, preprocess(photos.image(index), spec))[1].max() for index in range(COUNT))
    manifest = tiny_bundle.manifest
    some = manifest.heads["fp32"].thresholds[0]
    thresholds = tuple(some.model_copy(update={"confidences": (float(x),) * 2}) for x in (0, surest[COUNT // 2], 2))
    heads = {**manifest.heads, "fp32": manifest.heads["fp32"].model_copy(update={"thresholds": thresholds})}
    monkeypatch.setattr(tiny_bundle, "manifest", manifest.model_copy(update={"heads": heads}))
    return tiny_bundle


def test_who_is_sure_enough_exits_and_the_cloud_answers_the_rest(bundle: Bundle, photos: Photos) -> None:
    result = exits.exits(bundle, photos, None, "fp32")
    head, tail, spec = Head(bundle), open_tail(bundle), bundle.manifest.preprocessing
    for row, threshold in zip(result["thresholds"], bundle.manifest.heads["fp32"].thresholds, strict=True):
        left, right = 0, 0
        for index in range(COUNT):
            image_CHW = x_CHW = preprocess(photos.image(index), spec)
            answers = []
            for segment, confidence in enumerate(threshold.confidences):
                x_CHW, answer_K = head.segment(segment, x_CHW)
                answers += [answer_K] * bool(answer_K.max() >= confidence)
            left += bool(answers)
            right += int([*answers, tail.answer_images([image_CHW])[0]][0].argmax() == index % 2)
        assert row["on_device"]["value"] == pytest.approx(left / COUNT) == pytest.approx(sum(row["each_exit"]))
        assert row["accuracy"]["value"] == pytest.approx(right / COUNT)
        assert row["lost"] == pytest.approx(result["cloud_accuracy"]["value"] - right / COUNT)
    shares = [row["on_device"]["value"] for row in result["thresholds"]]
    assert shares[0] == 1 > shares[1] >= 0.5 > shares[2] == 0
    assert result["n"] == COUNT and len(result["exit_accuracy"]) == head.exits


def test_the_command_writes_what_it_prints(
    tiny_bundle: Bundle, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "photos_of", lambda task, labelled: {"defect": photos}[task])
    arguments = ["--bundle", str(tiny_bundle.folder), "--photos", "4", "--json", str(tmp_path / "new" / "exits.json")]
    found = CliRunner().invoke(exits.main, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "new" / "exits.json").read_text(encoding="utf-8"))
    assert result["n"] == 4 and "4 photos, fp32; cloud model" in found.output
    assert len(re.findall(r"^\| \d", found.output, re.MULTILINE)) == len(result["thresholds"])


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    found = CliRunner().invoke(exits.main, ["--bundle", str(tmp_path / "nowhere")])
    assert found.exit_code == 1 and found.stderr == f"error: {tmp_path / 'nowhere'}: no such bundle folder\n"
