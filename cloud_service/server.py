"""The service's life: load, warm up, serve, drain.

On SIGTERM: health says NOT_SERVING, streams are asked to half-close, then the port is closed; the worker goes last.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.process_collector import ProcessCollector

from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.language.engine import LanguageEngine
from isthmus.cloud_service.language.metrics import EngineMetricFamilies, EngineMetrics
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.servicer import SERVICE_NAME, Servicer, attach, service_info
from isthmus.cloud_service.vision.predictor import Predictor
from isthmus.cloud_service.vision.worker import Worker
from isthmus.models.bundle.files import read_manifest
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.language.torch.decoder import DTYPES, Decoder
from isthmus.models.vision.bundle import Bundle
from isthmus.protos import limits

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_CONCURRENT_CALLS = 1024  # open streams and calls; above it gRPC answers RESOURCE_EXHAUSTED at once

log = logging.getLogger("isthmus.cloud")


@dataclass(frozen=True)
class Bound:
    """Ports that were really taken."""

    grpc_port: int
    metrics_port: int | None


async def serve(config: CloudConfig) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises BundleError or InvalidInput before the port opens."""
    if config.threads:
        torch.set_num_threads(config.threads)
    answerers = [Predictor(Bundle.open(folder)) for folder in config.bundles]
    for answerer in answerers:
        answerer.warm_up()
    bundles = tuple(answerer.info for answerer in answerers)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = CloudMetrics(registry, bundles)
    worker = Worker({a.info.fingerprint: a for a in answerers}, config.batch, config.queue_limit, metrics)
    families = EngineMetricFamilies(registry)
    checkpoints = [Checkpoint.open(source) for source in config.models]
    handoffs = open_handoffs(config.handoffs, checkpoints)
    generations = [load_model(each, handoffs[each.fingerprint], config, families) for each in checkpoints]
    models = tuple(generation.info for generation in generations)
    servicer = Servicer(worker, service_info(bundles, models), metrics, generations)
    server = grpc.aio.server(options=limits.server_options(), maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS)
    attach(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bound = Bound(bind(server, config.listen, config.tls), serve_metrics(config.metrics, registry))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopping.set))
    running = [asyncio.create_task(worker.run()), *(asyncio.create_task(g.run()) for g in generations)]
    for task in running:
        task.add_done_callback(lambda _: stopping.set())  # a worker that dies must not leave a service that looks well
    await server.start()
    for name in ("", SERVICE_NAME):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    held = [(info.name, info.fingerprint) for info in bundles] + [(info.name, info.fingerprint) for info in models]
    held += [
        (f"hand-off of {info.name} behind layer {each.depth}", each.fingerprint)
        for info in models
        for each in handoffs[info.fingerprint]
    ]
    names = ", ".join(f"{name} {fingerprint.hex()[:12]}" for name, fingerprint in held)
    log.info("serving %s on port %d, metrics on port %s", names, bound.grpc_port, bound.metrics_port)
    await stopping.wait()
    log.info("draining, at most %.0f s", config.drain_s)
    await health_servicer.enter_graceful_shutdown()
    servicer.drain()
    for generation in generations:
        generation.drain()
    try:
        await asyncio.wait_for(servicer.drained(), config.drain_s)
    except TimeoutError:
        log.warning("some streams did not half-close in time")
    await server.stop(config.drain_s)  # calls that came in with the signal are still answered
    worker.drain()
    await asyncio.gather(*running)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # one more, while Python takes itself down, would count as a crash
    log.info("drained")


def open_handoffs(folders: Sequence[Path], checkpoints: Sequence[Checkpoint]) -> dict[bytes, list[HandoffBundle]]:
    """Hand-off bundles by the fingerprint of their model. Raises BundleError for one of no model here."""
    held = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints}
    handoffs: dict[bytes, list[HandoffBundle]] = {fingerprint: [] for fingerprint in held}
    for folder in folders:
        base = bytes.fromhex(read_manifest(folder, HandoffManifest).base)
        if base not in held:
            names = ", ".join(f"{each.name} {each.fingerprint.hex()[:12]}…" for each in checkpoints) or "none"
            raise BundleError(f"{folder}: belongs to the model {base.hex()[:12]}…, served are {names}")
        handoff = HandoffBundle.open(folder, held[base])
        if handoff.fingerprint in (other.fingerprint for other in handoffs[base]):
            raise BundleError(f"{folder}: this hand-off bundle of {held[base].name} is named twice")
        handoffs[base].append(handoff)
    return handoffs


def load_model(
    checkpoint: Checkpoint, handoffs: Sequence[HandoffBundle], config: CloudConfig, families: EngineMetricFamilies
) -> LanguageEngine:
    """A language model, warm. Raises BundleError, ServiceError when its answers would depend on the batch."""
    decoder = Decoder.load(checkpoint, DTYPES[config.dtype], config.width)
    metrics = EngineMetrics(families, checkpoint.name)
    generation = LanguageEngine(checkpoint, decoder, config.context_bytes, metrics, handoffs)
    generation.warm_up()
    return generation


def bind(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """Take the port. Raises InvalidInput when it cannot be had or a certificate cannot be read."""
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        roots = tls.client_ca.read_bytes() if tls.client_ca else None
        credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)
        return int(server.add_secure_port(address, credentials))
    except (RuntimeError, OSError) as error:
        raise InvalidInput(f"cannot listen on {address}: {str(error).splitlines()[0]}") from error


def serve_metrics(address: str | None, registry: CollectorRegistry) -> int | None:
    """Serve /metrics over HTTP in a thread of its own. Raises InvalidInput when the port cannot be had."""
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host, registry)
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidInput(f"cannot serve metrics on {address}: {error}") from error
    return int(server.server_port)
