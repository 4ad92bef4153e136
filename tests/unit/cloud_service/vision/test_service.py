from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.vision import predictor
from isthmus.cloud_service.vision.service import load
from isthmus.models.errors import BundleError
from isthmus.models.vision import tail
from isthmus.models.vision.bundle import Bundle


def test_every_bundle_is_loaded_and_has_its_metrics(tiny_bundle: Bundle) -> None:
    registry = CollectorRegistry()
    worker = load(CloudConfig(bundles=(tiny_bundle.folder,)), registry)
    assert [(info.name, info.fingerprint) for info in worker.bundles] == [
        (tiny_bundle.manifest.name, tiny_bundle.fingerprint)
    ]
    version = {"model": tiny_bundle.manifest.name, "version": tiny_bundle.fingerprint.hex()[:12]}
    assert registry.get_sample_value("isthmus_model_info", version) == 1


def test_bundles_are_warmed_up(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    predict = tail.Tail.images_to_tasks

    def counted(self: tail.Tail, images: list[np.ndarray], tasks: object) -> object:  # type: ignore[type-arg]
        batches.append(len(images))
        return predict(self, images, tasks)  # type: ignore[arg-type]

    monkeypatch.setattr(tail.Tail, "images_to_tasks", counted)
    load(CloudConfig(bundles=(tiny_bundle.folder,)), CollectorRegistry())
    assert batches == [1]


def test_without_bundles_nothing_is_served() -> None:
    assert load(CloudConfig(), CollectorRegistry()).bundles == ()


def test_a_folder_without_a_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        load(CloudConfig(bundles=(tmp_path,)), CollectorRegistry())


def test_a_bundle_of_graphs_that_the_device_cannot_compute_is_named(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictor, "open_tail", lambda bundle, device: tail.Tail(bundle))
    with caplog.at_level(logging.WARNING):
        load(CloudConfig(bundles=(tiny_bundle.folder,)), CollectorRegistry(), torch.device("cuda", 1))
    name = tiny_bundle.manifest.name
    assert caplog.messages == [f"ONNX Runtime cannot use cuda:1 here (onnxruntime-gpu can): the CPU computes {name}"]
