"""Settings of the service: made from the command line, the environment and a file by `cli`.

A field with a description is also an option, a name in the environment and a key of the file (`models.options`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr
from pydantic.dataclasses import dataclass

from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.models.address import ListenAddress, PeerAddress, is_loopback, parse_address
from isthmus.models.bundle.installed import find_all
from isthmus.models.errors import InvalidInput
from isthmus.models.secret_file import read_secret
from isthmus.models.settings import Flag, Settings

PREFIX = "ISTHMUS_CLOUD"  # of names in the environment
AUTHENTICATION = "to know the devices (--tls-client-ca or --access)"
DEVICE = re.compile(r"cpu|auto|cuda(:[0-9]{1,3})?", re.ASCII)


def device_name(name: str) -> str:
    """Raises ValueError unless it names a device; whether that exists is not looked at."""
    if not DEVICE.fullmatch(name):
        raise ValueError("expected cpu, cuda, cuda:N or auto")
    return name


@dataclass(frozen=True)
class Tls(Settings):
    """PEM files. With `client_ca`, devices must show a certificate that it signed."""

    certificate: Annotated[
        Path,
        Field(description="PEM file with the service's certificate; TLS is on when given with --tls-key."),
        Flag("tls_certificate", is_file=True),
    ]
    key: Annotated[
        Path,
        Field(description="PEM file with the key of that certificate."),
        Flag("tls_key", is_file=True),
    ]
    client_ca: Annotated[
        Path | None,
        Field(description="PEM file of an authority; devices must show a certificate that it signed."),
        Flag("tls_client_ca", is_file=True),
    ] = None


def base_url(text: str) -> str:
    """Raises ValueError unless it is the address of a server; /v1 at its end, as other clients want it, is left out."""
    parts = urlsplit(text)
    if not text.isprintable() or " " in text or parts.port == 0:  # a port that is no number raises by itself
        raise ValueError("expected http://HOST:PORT or https://HOST")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("expected http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it holds a user, give the key by --engine-key-file or ISTHMUS_CLOUD_ENGINE_KEY")
    return text.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class EngineConfig(Settings):
    """A server that runs a language model for the service."""

    url: Annotated[
        str,
        AfterValidator(base_url),
        Field(description="Address of an engine that runs a language model: vLLM, SGLang, or OpenAI-compatible."),
        Flag("engine_url", metavar="URL"),
    ]
    tokenizer: Annotated[
        str,
        Field(description="Tokenizer of the engine's model: a Hugging Face folder, a GGUF file, or smollm2."),
        Flag("engine_tokenizer"),
    ]
    dialect: Annotated[
        Literal["vllm", "sglang", "openai"],
        Field(description="How the engine is spoken to; openai is for any compatible server."),
        Flag("engine_dialect"),
    ] = "vllm"
    model: Annotated[
        str | None,
        Field(description="Name of the model at the engine, where it holds several."),
        Flag("engine_model"),
    ] = None
    key_file: Annotated[
        Path | None,
        Field(description="File with the engine's API key."),
        Flag("engine_key_file", is_file=True),
    ] = None
    key: Annotated[
        SecretStr | None,
        Field(description="The key itself; in the environment, since a command line can be seen by others."),
        Flag("engine_key"),
    ] = None
    requests: Annotated[
        int,
        Field(ge=1, le=4096, description="Requests at the engine at once; more wait, shared fairly between devices."),
        Flag("engine_requests"),
    ] = 256  # what vLLM batches by default
    context: Annotated[
        int,
        Field(ge=0, le=1 << 18, description="Tokens of prompt and answer together; 0 for what the engine says."),
        Flag("engine_context"),
    ] = 0
    check_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=100_000,
            description="Tokens that the engine both streams and verifies at start, to compare; 0 for none.",
        ),
        Flag("engine_check_tokens"),
    ] = 2000

    @property
    def secret(self) -> str:
        """The key, or an empty text. Raises InvalidInput for what cannot be one, and for a file that holds none."""
        return read_secret(self.key_file, self.key, f"{PREFIX}_ENGINE_KEY", "an API key")


@dataclass(frozen=True)
class RayConfig(Settings):
    """How many processes compute photos on a Ray cluster, and where that is."""

    replicas: Annotated[
        int,
        Field(ge=1, le=1000, description="Replicas to compute photos, each with --threads cores, or one; at least."),
    ] = 2
    max_replicas: Annotated[
        int, Field(ge=0, le=1000, description="Replicas under load, at most; 0 for as many as --replicas.")
    ] = 0
    address: Annotated[
        PeerAddress | None,
        Field(description="Address of a running Ray cluster; without it, one is started that ends with this program."),
        Flag(metavar="HOST:PORT"),
    ] = None


@dataclass(frozen=True)
class CloudConfig(Settings):
    """What is served, where, and how much at a time. Port 0 picks a free one."""

    bundles: Annotated[
        tuple[Path, ...],
        AfterValidator(find_all),
        Field(description="Vision bundle to serve: a folder, or the name of an installed one; repeatable."),
        Flag("bundle"),
    ] = ()
    models: Annotated[
        tuple[str, ...],
        Field(
            description="Language model to serve: a GGUF file, a Hugging Face folder, a language bundle, or smollm2;"
            " repeatable."
        ),
        Flag("model"),
    ] = ()
    handoffs: Annotated[
        tuple[Path, ...],
        AfterValidator(find_all),
        Field(description="Handoff bundle of one of the models, which then completes tokens for devices; repeatable."),
        Flag("handoff"),
    ] = ()
    device: Annotated[
        str,
        AfterValidator(device_name),
        Field(
            description="Where networks are computed: cpu, cuda, cuda:N for card N from 0, or auto for cuda where it"
            " can be used, else cpu."
        ),
        Flag(metavar="NAME"),
    ] = "cpu"
    dtype: Annotated[
        Literal["bfloat16", "float32"], Field(description="Number format of a language model's matrix products.")
    ] = "bfloat16"
    width: Annotated[int, Field(ge=1, le=256, description="Tokens in one forward pass of a language model.")] = 16
    context_bytes: Annotated[
        int,
        Field(
            ge=1 << 20,
            description="Mebibytes for the KV caches of all sessions of a language model, in the device's memory.",
        ),
        Flag("context_mb", 1 / (1 << 20)),
    ] = 2 << 30
    first_token_s: Annotated[
        float,
        Field(
            gt=0, le=600, description="Seconds that a prompt may wait for others; what would wait longer is refused."
        ),
    ] = 30.0  # people wait no longer, and a device has other ways
    share_prefixes: Annotated[
        Literal["everyone", "peer"],
        Field(
            description="Whose prompts share the state of a common beginning, such as a system prompt: everyone's, or"
            " those of one peer only. Who shares can find out whether a beginning was sent before."
        ),
    ] = "everyone"
    listen: Annotated[
        ListenAddress,
        Field(description="Address of the gRPC service; port 0 picks a free one."),
        Flag(metavar="HOST:PORT"),
    ] = "127.0.0.1:50051"
    metrics: Annotated[
        ListenAddress | None,
        Field(description="Address of /metrics for Prometheus; empty for none."),
        Flag(metavar="HOST:PORT"),
    ] = "127.0.0.1:9101"
    threads: Annotated[int, Field(ge=0, le=1024, description="Threads of PyTorch; 0 for one a core.")] = 0
    batch: BatchLimits = BatchLimits()
    queue_limit: Annotated[int, Field(ge=1, le=100_000, description="Photos that may wait; more are refused.")] = (
        256  # at 50 a second, five seconds of work, longer than most devices wait
    )
    queue_bytes: Annotated[
        int,
        Field(ge=1 << 20, description="Mebibytes of payloads, answers and texts that may wait; more are refused."),
        Flag("queue_mb", 1 / (1 << 20)),
    ] = 256 << 20  # sixty of the largest photos; a queue of usual payloads takes a few
    drain_s: Annotated[float, Field(ge=0, le=600, description="Seconds to finish what is running after SIGTERM.")] = (
        20.0
    )
    tls: Tls | None = None
    engine: EngineConfig | None = None
    insecure_listen: Annotated[
        bool,
        Field(description="Listen beyond loopback without TLS, or without knowing the devices: for a trusted network."),
    ] = False
    access: Annotated[
        Path | None,
        Field(
            description="File of tokens, quotas and revoked devices, made by `cloud-service keys`; read again when it"
            " changes. Without --tls-client-ca each device must show one of its tokens."
        ),
        Flag(is_file=True),
    ] = None

    def __post_init__(self) -> None:
        host = parse_address(self.listen).host
        if is_loopback(host) or self.insecure_listen:
            return
        missing = [
            *(() if self.tls else ("TLS (--tls-certificate and --tls-key)",)),
            *(() if self.access or (self.tls and self.tls.client_ca) else (AUTHENTICATION,)),
        ]
        if missing:
            raise InvalidInput(
                f"--listen {self.listen} can be reached from other machines, which needs {' and '.join(missing)};"
                " `cloud-service keys init` makes the files, --insecure-listen goes without"
            )
