from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import own, own_data
from isthmus.models.recipes.vision.cutting import Captured, capture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tail import open_tail

SIDE = 32
SPEC = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5,) * 3, deviation=(0.5,) * 3)
SHADES = {"bright": 200, "dark": 40}


class Own(nn.Module):
    """Somebody's network: which of two shades an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.third = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(16, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.classifier(self.third(self.second(self.first(x_BCHW))).mean((2, 3)))
        return logits_BK


def factory() -> nn.Module:
    torch.manual_seed(0)
    return Own()


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(factory(), (3, SIDE, SIDE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, shade in SHADES.items():
        (root / name).mkdir()
        for index in range(80):
            pixels = np.clip(rng.normal(shade, 30, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{index}.png")
    return root


@pytest.fixture(scope="module")
def made(captured: Captured, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, float]]:
    """A bundle of one epoch a stage."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BRIDGE_EPOCHS", "DECODER_EPOCHS", "TAIL_EPOCHS"):
            patch.setattr(own, name, 1)
        settings = own.Settings("own", "mine", SPEC)
        run = Run(tmp_path_factory.mktemp("work"), 0)
        return own.make(tmp_path_factory.mktemp("zoo") / "own", run, "test", captured, own_data.find(folder), settings)


def test_cuts_are_proposed_where_little_crosses_early(captured: Captured) -> None:
    assert [cut.name for cut in captured.cuts] == ["first", "second", "third"]
    assert own.proposed(captured) == ("first", "second")


def test_the_table_shows_where_less_crosses_and_what_was_chosen() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 16, 3, 1, 1), nn.Conv2d(16, 2, 3, 2, 1), nn.Flatten())
    captured = capture(nn.Sequential(*wide, nn.Linear(128, 2)), (3, SIDE, SIDE))
    title, *rows, left_out = own.table(captured, ["2"], 3 * SIDE**2)
    assert "MMAC" in title and [row.split()[:2] for row in rows] == [["0", "4x16x16"], [">", "2"]]
    assert left_out.strip().startswith("and 1 more")
    chosen = own.table(captured, ["1"], 3 * SIDE**2)
    assert [row[:3] for row in chosen[1:]] == ["  0", "> 1", "  2"]


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [("first",), ("first", "second"), ("third",)])
def test_blocks_behind_the_last_cut_are_the_rest_of_the_model(captured: Captured, cuts: tuple[str, ...]) -> None:
    network = own.backbone(captured, cuts)
    images_B3HW = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(network(images_B3HW), factory()(images_B3HW))
    assert len(network.channels) == len(network.blocks) - 1
    assert network.channels[len(cuts) - 1] == {"first": 8, "second": 16, "third": 16}[cuts[-1]]


@torch.inference_mode(False)
def test_a_bottleneck_starts_as_the_way_there_and_back(captured: Captured) -> None:
    torch.manual_seed(0)
    split = SplitClassifier(own.architecture(captured, ("first",)), own.backbone(captured, ("first",))).eval()
    images_N3HW = np.random.default_rng(0).integers(0, 256, (64, 3, SIDE, SIDE), dtype=np.uint8)
    own.start(split, own_data.Images(images_N3HW, None), SPEC)
    images_B3HW = torch.from_numpy(own_data.normalise(images_N3HW[:8], SPEC))
    with torch.no_grad():
        features_BCHW = split.trunk(images_B3HW)
        back_BCHW = split.decode(0, split.tap(0).encoder(features_BCHW), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(back_BCHW, features_BCHW, rtol=1e-2, atol=1e-2)  # as many latents as channels


def test_the_cloud_answers_whole_images_as_the_model_does(made: tuple[Bundle, dict[str, float]]) -> None:
    bundle, _ = made
    tail = open_tail(bundle)
    assert isinstance(tail, GraphTail)
    images = list(np.random.default_rng(1).normal(size=(5, 3, SIDE, SIDE)).astype(np.float32))
    with torch.inference_mode():
        wanted_BK = factory()(torch.from_numpy(np.stack(images))).softmax(1)
    np.testing.assert_allclose(tail.answer_images(images), wanted_BK, atol=1e-5)


def test_device_and_cloud_answer_through_real_bytes(made: tuple[Bundle, dict[str, float]]) -> None:
    bundle, _ = made
    head, tail, codec = Head(bundle, 1), open_tail(bundle), bundle.codec(0)
    x_CHW = np.random.default_rng(1).normal(size=(3, SIDE, SIDE)).astype(np.float32)
    for index in range(head.exits):
        x_CHW, answer_K = head.segment(index, x_CHW)
        assert answer_K.shape == (2,)
    for rate in codec.rates:
        integers_CHW = codec.quantise(head.encode(0, x_CHW, 0), rate)
        latent_CHW = codec.dequantise(codec.decode(codec.encode(integers_CHW, rate), rate), rate)
        (answer_BK,) = tail.latents_to_tasks(0, [latent_CHW, latent_CHW], [rate, rate], [0])
        np.testing.assert_allclose(answer_BK.sum(1), 1, atol=1e-5)


def test_the_manifest_says_what_was_measured(made: tuple[Bundle, dict[str, float]]) -> None:
    bundle, figures = made
    manifest = bundle.manifest
    assert [task.labels for task in manifest.tasks] == [("bright", "dark")]
    assert manifest.graphs is not None and manifest.weights is None
    assert "160 images of the user's, labelled; cut behind first, second" in manifest.training.data
    assert manifest.scores["test cloud accuracy"].samples > own_data.LEAST
    assert figures["jpeg75_bytes"] > 100


def test_the_model_is_not_changed(made: tuple[Bundle, dict[str, float]], captured: Captured) -> None:
    assert made
    for ours, theirs in zip(captured.graph.parameters(), factory().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_number_of_classes_is_refused(captured: Captured, folder: Path, tmp_path: Path) -> None:
    wrong = own_data.Folder(folder, own_data.find(folder).paths, ("a", "b", "c"))
    settings = own.Settings("own", "mine", SPEC)
    with pytest.raises(InvalidInput, match="has 3 sub-folders as classes, the model answers 2 classes"):
        own.make(tmp_path / "b", Run(tmp_path, 0), "test", captured, wrong, settings)
    assert not (tmp_path / "b").exists()


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


def nothing() -> str:
    return "a word"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nets", "expected package.module:factory"),
        ("no_such_package.nets:make", "ModuleNotFoundError"),
        ("{here}:missing", "AttributeError"),
        ("{here}:broken", "RuntimeError: .*no weights here"),
        ("{here}:nothing", "made a str, expected a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(reference: str, words: str) -> None:
    sys.modules["own_nets"] = sys.modules[__name__]
    with pytest.raises(InvalidInput, match=words) as caught:
        own.load_model(reference.format(here="own_nets"))
    assert "\n" not in str(caught.value)


def test_a_model_is_made_by_its_factory() -> None:
    sys.modules["own_nets"] = sys.modules[__name__]
    model = own.load_model("own_nets:factory")
    assert isinstance(model, Own) and not model.training


def test_classes_in_another_order_are_found_before_training() -> None:
    labels_N = np.repeat([0, 1, 2], 10)
    own.check_order(labels_N, labels_N, ("ant", "bee", "cow"))
    own.check_order(np.zeros(30, np.int64), labels_N, ("ant", "bee", "cow"))  # a bad model, whatever its order
    with pytest.raises(InvalidInput, match=r"right on 0% .* on 100% if its classes were bee, cow, ant"):
        own.check_order(np.repeat([2, 0, 1], 10), labels_N, ("ant", "bee", "cow"))
