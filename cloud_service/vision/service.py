"""Loads the bundles that a service answers photos with."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.vision.predictor import Predictor
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.vision.bundle import Bundle


def load(config: CloudConfig, registry: CollectorRegistry) -> Worker:
    """A worker over all bundles of the configuration, warmed up. Raises BundleError."""
    predictors = [Predictor(Bundle.open(folder)) for folder in config.bundles]
    for predictor in predictors:
        predictor.warm_up()
    metrics = CloudMetrics(registry, [predictor.info for predictor in predictors])
    return Worker(predictors, config.batch, config.queue_limit, metrics)
