from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.vision import tail as tail_module
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tail import Tail, load_split, open_tail
from tests.one_device import META, OneDevice, without_pinning
from tests.tiny_bundle import TINY, random_images

IMAGES = random_images(3, seed=5)


@torch.inference_mode()
def test_a_whole_image_meets_no_bottleneck(tiny_bundle: Bundle) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    features = [head.segment(1, head.segment(0, image_CHW)[0])[0] for image_CHW in IMAGES]
    joined_BK = split.tail(torch.from_numpy(np.stack(features))).softmax(1)
    np.testing.assert_allclose(Tail(tiny_bundle).answer_images(IMAGES), joined_BK, atol=1e-4)


def random_latents(bundle: Bundle, tap: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=bundle.manifest.taps[tap].latent).astype(np.float32) for _ in range(3)]


@torch.inference_mode()
@pytest.mark.parametrize("tap", [0, 1])
def test_latents_are_answered_by_decoder_and_tail_at_their_rates(tiny_bundle: Bundle, tap: int) -> None:
    split, latents = load_split(tiny_bundle), random_latents(tiny_bundle, tap)
    answers_BK = Tail(tiny_bundle).answer_latents(tap, latents, [1, 0, 1])
    features_BCHW = split.decode(tap, torch.from_numpy(np.stack(latents)), torch.tensor([1, 0, 1]))
    np.testing.assert_allclose(answers_BK, split.answer(features_BCHW, 0, tap).softmax(1), atol=1e-4)
    np.testing.assert_allclose(answers_BK.sum(1), 1, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("tasks", [(0,), (1,), (0, 1)])
def test_each_requested_task_is_answered_from_the_same_features(tiny_bundle: Bundle, tasks: tuple[int, ...]) -> None:
    split, tail, latents = load_split(tiny_bundle), Tail(tiny_bundle), random_latents(tiny_bundle, 1)
    features_BCHW = split.decode(1, torch.from_numpy(np.stack(latents)), torch.tensor([1, 0, 1]))
    answers = tail.latents_to_tasks(1, latents, [1, 0, 1], tasks)
    assert [answer_BK.shape for answer_BK in answers] == [(3, (2, 3)[task]) for task in tasks]
    for task, answer_BK in zip(tasks, answers, strict=True):
        np.testing.assert_allclose(answer_BK, split.answer(features_BCHW, task, 1).softmax(1), atol=1e-4)
    trunk_BCHW = split.trunk(torch.from_numpy(np.stack(IMAGES)))
    for task, answer_BK in zip(tasks, tail.images_to_tasks(IMAGES, tasks), strict=True):
        np.testing.assert_allclose(answer_BK, split.answer(trunk_BCHW, task).softmax(1), atol=1e-4)


def test_the_tail_is_not_run_for_who_does_not_ask_for_the_first_task(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(split: SplitClassifier, features_BCHW: Any) -> None:
        raise AssertionError("the tail was run")

    tail, latents = Tail(tiny_bundle), random_latents(tiny_bundle, 0)
    own = tail._split.tap(0).tail
    assert own is not None
    monkeypatch.setattr(SplitClassifier, "tail", run)
    monkeypatch.setattr(own, "forward", partial(run, tail._split))
    assert tail.latents_to_tasks(0, latents, [0, 1, 2], (1,))[0].shape == (3, 3)
    assert tail.images_to_tasks(IMAGES, (1,))[0].shape == (3, 3)


def test_an_answer_does_not_depend_on_the_batch(tiny_bundle: Bundle) -> None:
    tail = Tail(tiny_bundle)
    alone_BK = np.concatenate([tail.answer_images([image_CHW]) for image_CHW in IMAGES])
    np.testing.assert_allclose(tail.answer_images(IMAGES), alone_BK, atol=1e-5)


def with_weights(
    tiny_bundle: Bundle, change: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> Bundle:
    """The tiny bundle as if its weights file held what `change` makes of it."""
    tensors = safetensors.numpy.load((tiny_bundle.folder / "weights.safetensors").read_bytes())
    change(tensors)
    monkeypatch.setattr(Bundle, "tensors", lambda self, name: tensors)
    return tiny_bundle


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("exits.0.linear.bias"), r"weights lack exits\.0\.linear\.bias"),
        (lambda t: t.update(extra=np.zeros(3)), "weights have unknown extra"),
        (
            lambda t: t.update({"exits.0.linear.bias": np.zeros(3, np.float32)}),
            r"weight exits\.0\.linear\.bias has shape \(3,\), the architecture says \(2,\)",
        ),
    ],
    ids=["lacking", "unknown", "wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_bundle: Bundle, change: Callable[[dict[str, Any]], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match=words):
        load_split(with_weights(tiny_bundle, change, monkeypatch))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"builder": "transformer"}, "no builder 'transformer', there are split_classifier"),
        ({"backbone": "resnet50"}, "the architecture cannot be built: 'resnet50'"),
        ({"cuts": (2, 99)}, "the architecture cannot be built"),
        ({"classes": (3, 3)}, "has shape"),
        ({"cuts": (2, 7)}, "has shape|lack|unknown"),
        ({"classes": (2,)}, r"have unknown heads\.0"),
        ({"taps": TINY.taps[:1]}, r"have unknown taps\.1"),
    ],
    ids=["builder", "backbone", "cut after the end", "classes", "other cut", "a task less", "a tap less"],
)
def test_an_architecture_that_does_not_fit_is_refused(tiny_bundle: Bundle, update: dict[str, Any], words: str) -> None:
    manifest = tiny_bundle.manifest
    lying = manifest.model_copy(update={"architecture": manifest.architecture.model_copy(update=update)})
    with pytest.raises(BundleError, match=words):
        load_split(Bundle(tiny_bundle.folder, lying))


def test_weights_are_stored_as_halves_and_used_as_floats(tiny_bundle: Bundle) -> None:
    stored = tiny_bundle.tensors("weights.safetensors")["backbone.blocks.0.0.weight"]
    assert stored.dtype == np.float16
    used = load_split(tiny_bundle).state_dict()["backbone.blocks.0.0.weight"]
    assert used.dtype == torch.float32
    np.testing.assert_array_equal(used, stored.astype(np.float32))


def test_the_file_is_smaller_than_its_floats(tiny_bundle: Bundle) -> None:
    path: Path = tiny_bundle.folder / "weights.safetensors"
    floats = sum(tensor.numel() for tensor in load_split(tiny_bundle).state_dict().values()) * 4
    assert path.stat().st_size < 0.6 * floats


def test_on_a_device_all_of_a_batch_is_computed_there(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[torch.Tensor]()

    def download(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        read.append(tensor)
        return np.full(tensor.shape, 0.5, np.float32)

    without_pinning(monkeypatch)
    monkeypatch.setattr(tail_module, "download", download)
    tail = open_tail(tiny_bundle, META)
    assert tail.device == META
    with OneDevice():
        for tap in range(len(tiny_bundle.manifest.taps)):
            answers = tail.latents_to_tasks(tap, random_latents(tiny_bundle, tap), [1, 0, 1], (0, 1))
            assert [answer_BK.shape[0] for answer_BK in answers] == [3, 3]
        tail.images_to_tasks(IMAGES, (0, 1))
    assert {tensor.device for tensor in read} == {META}
