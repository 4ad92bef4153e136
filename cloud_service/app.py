"""Puts the service together: loads both wings, serves them, drains them. The one module that imports both.

On SIGTERM or SIGINT health reports NOT_SERVING, streams are asked to half-close, then the port is closed; batches of
photos that are still queued are answered last.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from isthmus.cloud_service.access import Access
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.handshakes import HandshakeLog, watching
from isthmus.cloud_service.language import service as language_service
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.server import Server
from isthmus.cloud_service.servicer import Servicer
from isthmus.cloud_service.vision import service as vision_service
from isthmus.cloud_service.vision.forwarder import Forwarder
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.torch_device import describe_device, open_device

log = logging.getLogger("isthmus.cloud")

LoadVision = Callable[[CloudConfig, CollectorRegistry, torch.device], Worker | Forwarder]


async def serve(config: CloudConfig, load_vision: LoadVision = vision_service.load) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises BundleError or InvalidInput before the port opens.

    `load_vision`: makes what answers photos.
    """
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # asyncio's would cancel the start of gRPC, which then hangs
    if config.threads:
        torch.set_num_threads(config.threads)
    device = open_device(config.device)
    if config.device != "cpu":
        log.info("computing on %s", describe_device(device))
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    queue = ByteBudget(config.queue_bytes)
    vision = load_vision(config, registry, device)
    vision.metrics.watch(queue)
    language = language_service.load(config, registry, queue, device)
    access = Access(config.access, by_certificate=bool(config.tls and config.tls.client_ca))
    server = Server(Servicer(vision, language, vision.metrics, queue, access), vision, language, vision.metrics)
    with watching(HandshakeLog(vision.metrics.auth_failed)) if config.tls else nullcontext():
        ports = await server.start(config, registry)
        names = ", ".join(held(vision, language))
        log.info("serving %s on %s", names, ports.describe(config))
        await server.stopping.wait()
        log.info("draining, at most %.0f s", config.drain_s)
        await server.drain(config.drain_s)
        log.info("drained")


def held(vision: Worker | Forwarder, language: LanguageService) -> Iterator[str]:
    """Names and fingerprints of everything that is served."""
    for bundle in vision.bundles:
        yield f"{bundle.name} {bundle.fingerprint.hex()[:12]}"
    for host in language.remote:
        yield host.described
    for engine in language.engines:
        yield f"{engine.info.name} {engine.info.fingerprint.hex()[:12]}"
        for handoff in engine.handoffs:
            yield f"handoff of {engine.info.name} after layer {handoff.depth} {handoff.fingerprint.hex()[:12]}"
