"""The language models of a service: loading, a handler for each stream, running and draining."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.language.engines.load import load_remote
from isthmus.cloud_service.language.engines.native import LanguageEngine
from isthmus.cloud_service.language.engines.protocol import SessionHost
from isthmus.cloud_service.language.engines.relay import RelayHost
from isthmus.cloud_service.language.handler import GenerateHandler
from isthmus.cloud_service.language.metrics import EngineMetricFamilies, EngineMetrics
from isthmus.models.bundle.files import read_manifest
from isthmus.models.errors import BundleError, EngineDown, UnknownBundle
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.language.torch.decoder import DTYPES, Decoder
from isthmus.models.messages import ModelInfo
from isthmus.protos.limits import BUNDLE_ID_BYTES


class LanguageService:
    """Any number of models, each with the host of its sessions."""

    def __init__(self, engines: Sequence[LanguageEngine] = (), remote: Sequence[RelayHost] = ()) -> None:
        self.engines, self.remote = tuple(engines), tuple(remote)
        self._hosts: tuple[SessionHost[Any], ...] = (*engines, *remote)
        self._draining = asyncio.Event()

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """Those that can be used now."""
        return tuple(host.info for host in self._hosts if host.info is not None)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why models cannot be used, each in a line."""
        return tuple(host.problem for host in self._hosts if host.problem)

    def tokenizer(self, sha256: bytes) -> bytes | None:
        """The tokenizer of this SHA-256; None where no model has it."""
        found = (host.tokenizer for host in self._hosts if host.info and host.info.tokenizer.sha256 == sha256)
        return next((tokenizer.to_bytes() for tokenizer in found), None)

    def new_handler(self, peer: str) -> GenerateHandler:
        """A handler for one `Generate` stream of a connection."""
        return GenerateHandler(self._find, peer)

    async def run(self) -> None:
        """Run all engines until drained. Raises what an engine raises, at once."""
        await asyncio.gather(self._draining.wait(), *(host.run() for host in self._hosts))

    def drain(self) -> None:
        """Send every session to another replica; `run` returns after the step under way."""
        self._draining.set()
        for host in self._hosts:
            host.drain()

    def _find(self, model: bytes) -> SessionHost[Any]:
        """Raises UnknownBundle; EngineDown where the model may be one that cannot be used now."""
        for host in self._hosts:
            if host.info is not None and host.info.fingerprint[:BUNDLE_ID_BYTES] == model:
                return host
        for problem in self.problems:
            raise EngineDown(problem)
        held = ", ".join(sorted(info.fingerprint[:BUNDLE_ID_BYTES].hex() for info in self.models)) or "none"
        raise UnknownBundle(f"model {model.hex()} is not held here, there is {held}")


def load(config: CloudConfig, registry: CollectorRegistry, queue: ByteBudget) -> LanguageService:
    """All models of the configuration, warmed up. `queue`: for what sessions take beside their caches.

    Raises BundleError, or ServiceError when a model's results would depend on the batch.
    """
    families = EngineMetricFamilies(registry)
    checkpoints = [Checkpoint.open(source) for source in config.models]
    handoffs = open_handoffs(config.handoffs, checkpoints)
    engines = [load_model(each, handoffs[each.fingerprint], config, families, queue) for each in checkpoints]
    return LanguageService(engines, load_remote(config, registry, queue))


def open_handoffs(folders: Sequence[Path], checkpoints: Sequence[Checkpoint]) -> dict[bytes, list[HandoffBundle]]:
    """Handoff bundles by the fingerprint of their model. Raises BundleError for a bundle of another model."""
    held = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints}
    handoffs: dict[bytes, list[HandoffBundle]] = {fingerprint: [] for fingerprint in held}
    for folder in folders:
        base = bytes.fromhex(read_manifest(folder, HandoffManifest).base)
        if base not in held:
            names = ", ".join(f"{each.name} {each.fingerprint.hex()[:12]}…" for each in checkpoints) or "none"
            raise BundleError(f"{folder}: belongs to the model {base.hex()[:12]}…, served are {names}")
        handoff = HandoffBundle.open(folder, held[base])
        if handoff.fingerprint in (other.fingerprint for other in handoffs[base]):
            raise BundleError(f"{folder}: this handoff bundle of {held[base].name} is named twice")
        handoffs[base].append(handoff)
    return handoffs


def load_model(
    checkpoint: Checkpoint,
    handoffs: Sequence[HandoffBundle],
    config: CloudConfig,
    families: EngineMetricFamilies,
    queue: ByteBudget,
) -> LanguageEngine:
    """One engine, warmed up. Raises BundleError, or ServiceError when results would depend on the batch."""
    decoder = Decoder.load(checkpoint, DTYPES[config.dtype], config.width)
    metrics = EngineMetrics(families, checkpoint.name)
    budget_bytes, first_token_s = config.context_bytes, config.first_token_s
    engine = LanguageEngine(
        checkpoint, decoder, budget_bytes, metrics, handoffs, queue=queue, first_token_s=first_token_s
    )
    engine.warm_up()
    return engine
