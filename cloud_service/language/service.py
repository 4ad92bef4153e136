"""The language models of a service: loading, a handler for each stream, running and draining."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
from isthmus.models.errors import BundleError, EngineDown, InvalidInput, UnknownBundle
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.language.torch.decoder import DTYPES, Decoder
from isthmus.models.language.torch.kv_pool import KVPool
from isthmus.models.language.torch.paged_decoder import PagedDecoder, graphs_on
from isthmus.models.messages import ModelInfo
from isthmus.models.torch_device import CPU
from isthmus.protos.limits import BUNDLE_ID_BYTES


class LanguageService:
    """Any number of models, each with the host of its sessions."""

    def __init__(self, engines: Sequence[LanguageEngine] = (), remote: Sequence[RelayHost] = ()) -> None:
        self.engines, self.remote = tuple(engines), tuple(remote)
        self._hosts: tuple[SessionHost[Any], ...] = (*engines, *remote)
        self._tokenizers: dict[bytes, bytes] = {}  # that were fetched, by SHA-256: streams share the bytes
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
        for host in self._hosts:
            if host.info is not None and host.info.tokenizer.sha256 == sha256:
                if sha256 not in self._tokenizers:
                    self._tokenizers[sha256] = host.tokenizer.to_bytes()
                return self._tokenizers[sha256]
        return None

    def new_handler(self, peer: str, session_bytes: int | None = None) -> GenerateHandler:
        """A handler for one `Generate` stream of a peer, whose sessions may hold so many bytes of KV caches."""
        return GenerateHandler(self._find, peer, session_bytes)

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


def load(
    config: CloudConfig, registry: CollectorRegistry, queue: ByteBudget, device: torch.device = CPU
) -> LanguageService:
    """All models of the configuration, warmed up. `queue`: for what sessions take beside their caches.

    Raises BundleError, InvalidInput for more than the device's memory holds, or ServiceError when a model's results
    would depend on the batch.
    """
    families = EngineMetricFamilies(registry)
    checkpoints = [Checkpoint.open(source) for source in config.models]
    handoffs = open_handoffs(config.handoffs, checkpoints)
    engines = [load_model(each, handoffs[each.fingerprint], config, families, queue, device) for each in checkpoints]
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
    device: torch.device,
) -> LanguageEngine:
    """One engine, warmed up. Raises what `load` raises."""
    metrics = EngineMetrics(families, checkpoint.name)
    budget_bytes, first_token_s = config.context_bytes, config.first_token_s
    with within_memory(checkpoint.name, config, device):
        engine = LanguageEngine(
            checkpoint,
            open_decoder(checkpoint, config, device),
            budget_bytes,
            metrics,
            handoffs,
            queue=queue,
            first_token_s=first_token_s,
            isolated=config.share_prefixes == "peer",
        )
        engine.warm_up()
    return engine


def open_decoder(checkpoint: Checkpoint, config: CloudConfig, device: torch.device) -> Decoder:
    """A decoder for the CPU, or for a CUDA device with all memory of its KV caches. Raises torch.OutOfMemoryError."""
    decoder = Decoder.load(checkpoint, DTYPES[config.dtype], config.width, device)
    if device.type == "cpu":
        return decoder
    pool = KVPool(checkpoint.config, decoder.dtype, device, config.context_bytes)
    return PagedDecoder(decoder, pool, graphs_on(device))


@contextmanager
def within_memory(model: str, config: CloudConfig, device: torch.device) -> Iterator[None]:
    """Raise InvalidInput with what the device has where its memory is exhausted."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = f"the weights of {model} in {config.dtype} and --context-mb {config.context_bytes >> 20}"
        memory = torch.cuda.get_device_properties(device).total_memory
        raise InvalidInput(f"{needed} do not fit into the {memory >> 20} MiB of {device}") from error
