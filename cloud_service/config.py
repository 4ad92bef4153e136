"""Settings of the service, parsed once by `__main__`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isthmus.cloud_service.vision.batching import BatchLimits


@dataclass(frozen=True)
class Tls:
    """PEM files. With `client_ca`, devices must show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class CloudConfig:
    """`listen` and `metrics` are host:port; port 0 picks a free one."""

    bundles: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()  # GGUF files, Hugging Face folders, or `smollm2`
    handoffs: tuple[Path, ...] = ()  # bundles, each of one of the models
    dtype: str = "bfloat16"  # of a language model's matrix products
    width: int = 16  # rows of a decoder's forward pass
    context_bytes: int = 2 << 30  # of all sessions' keys and values, for each model
    listen: str = "127.0.0.1:50051"
    metrics: str | None = "127.0.0.1:9101"
    threads: int = 0  # of a network; 0 for every core
    batch: BatchLimits = BatchLimits()
    queue_limit: int = 256  # inputs waiting; at 50 a second, five seconds of work, longer than most devices wait
    drain_s: float = 20.0
    tls: Tls | None = None
