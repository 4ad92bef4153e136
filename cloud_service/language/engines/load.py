"""Puts the engine of the settings together: tokenizer, dialect, client, watch, sessions."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig, EngineConfig
from isthmus.cloud_service.language.engines.dialect import Dialect, Probe
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.engines.openai import OpenAiProbe
from isthmus.cloud_service.language.engines.relay import RelayHost
from isthmus.cloud_service.language.engines.sglang import SglangDialect
from isthmus.cloud_service.language.engines.vllm import VllmDialect
from isthmus.cloud_service.language.engines.watch import Watch, WatchSettings
from isthmus.models.errors import BundleError
from isthmus.models.fail import needing
from isthmus.models.language.checkpoint.checkpoint import open_tokenizer
from isthmus.models.language.checkpoint.tokenizer import Tokenizer


def load_remote(config: CloudConfig, registry: CollectorRegistry, queue: ByteBudget) -> list[RelayHost]:
    """The engine of the settings, if there is one; it is reached later. Raises BundleError, InvalidInput."""
    if config.engine is None:
        return []
    with needing("cloud"):
        from isthmus.cloud_service.language.engines.http import HttpEngine

    settings, metrics = config.engine, RequestMetrics(registry)
    key = settings.secret
    tokenizer = end_checked(settings.tokenizer)
    dialect, probe = choose_dialect(settings, tokenizer)
    engine = HttpEngine(settings.url, dialect, metrics, queue, probe=probe, model=settings.model, key=key)
    watched = WatchSettings(settings.url, settings.context, settings.check_tokens)
    watch = Watch(engine, tokenizer, metrics, watched)
    return [RelayHost(engine, watch, metrics, queue=queue, requests=settings.requests, wait_s=config.first_token_s)]


def choose_dialect(settings: EngineConfig, tokenizer: Tokenizer) -> tuple[Dialect | None, Probe | None]:
    """The dialect, or what finds it out."""
    if settings.dialect == "openai":
        return None, OpenAiProbe(tokenizer)
    if settings.dialect == "sglang":
        return SglangDialect(tokenizer.size, tokenizer.eos_ids), None
    return VllmDialect(tokenizer.size, tokenizer.eos_ids), None


def end_checked(source: str) -> Tokenizer:
    """A tokenizer that names what ends an answer. Raises BundleError."""
    try:
        tokenizer = open_tokenizer(source)
    except BundleError as error:
        raise BundleError(f"--engine-tokenizer {error}") from error
    if not tokenizer.eos_ids:
        raise BundleError(f"--engine-tokenizer {source}: names no token that ends an answer")
    return tokenizer
