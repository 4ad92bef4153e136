"""Loads the bundles that a service answers photos with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision.decoding import ImageDecoder
from isthmus.cloud_service.vision.predictor import Predictor
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.messages import BundleInfo
from isthmus.models.torch_device import CPU
from isthmus.models.vision.bundle import Bundle

log = logging.getLogger("isthmus.cloud")
NewMetrics = Callable[[CollectorRegistry, Sequence[BundleInfo]], CloudMetrics]

DECODERS = 2  # processes of 50 MB each: while one is busy with an image made to take long, the other serves the rest


def load(
    config: CloudConfig, registry: CollectorRegistry, device: torch.device = CPU, count: NewMetrics = CloudMetrics
) -> Worker:
    """A worker over all bundles of the configuration, warmed up. `count`: makes its metrics. Raises BundleError."""
    predictors = [Predictor(Bundle.open(folder), device) for folder in config.bundles]
    for predictor in predictors:
        predictor.warm_up()
        if predictor.device != device:
            log.warning(
                "ONNX Runtime cannot use %s here (onnxruntime-gpu can): the CPU computes %s",
                device,
                predictor.info.name,
            )
    metrics = count(registry, [predictor.info for predictor in predictors])
    decoders = [ImageDecoder() for _ in range(DECODERS if predictors else 0)]
    return Worker(predictors, decoders, config.batch, config.queue_limit, metrics)
