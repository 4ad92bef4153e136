"""Settings of the agent: made from the command line, the environment and a file by `cli`, or in Python.

A field with a description is also an option, a name in the environment and a key of the file (`models.options`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, SecretStr
from pydantic.dataclasses import dataclass

from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.exploration import PROBE_BYTES_PER_HOUR
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.edge_agent.spending import Budgets, OwnWeights
from isthmus.models.address import ListenAddress, PeerAddress
from isthmus.models.bundle.installed import find
from isthmus.models.errors import InvalidInput
from isthmus.models.secret_file import read_secret
from isthmus.models.settings import Flag, Settings
from isthmus.models.vision.manifest import DEFAULT_EPSILON, Among, Precision, Promise

PREFIX = "ISTHMUS_EDGE"  # of names in the environment
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # that gRPC obeys, in its order
Mode = Literal["auto", "edge", "split", "offload"]
MODES: tuple[Mode, ...] = get_args(Mode)
MIN_DEADLINE_S, MAX_DEADLINE_S = 0.001, 600

Share = Annotated[float, Field(ge=0, le=1)]
Origin = Annotated[
    str, Field(max_length=300, pattern=r"^[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:_-]+$")
]  # as browsers send it
ConnectSeconds = Annotated[
    float, Field(ge=0, le=600, description="Seconds to wait for the cloud's first answer before starting without it.")
]
Clouds = Annotated[
    tuple[PeerAddress, ...],
    Field(description="Cloud services, in order of preference; without any the device answers alone."),
    Flag("cloud", separator=",", metavar="HOST:PORT"),
]
ProbeBytes = Annotated[
    int,
    Field(
        ge=0,
        description="Bytes an hour that may be spent on measuring links that no request measures; 0 turns that off.",
    ),
]
Threads = Annotated[int, Field(ge=0, le=256, description="Threads of ONNX Runtime; 0 for one a core.")]
Best = Annotated[
    Objective,
    Field(
        description="What the router minimises among the ways that keep the quality and every constraint: time, money,"
        " modelled energy, or disagreement with the cloud's model."
    ),
]
Profile = Annotated[
    str,
    Field(
        description="Prices and modelled energy of the device and its link: wifi, lte, lte-m, wired, or a TOML file.",
        min_length=1,
    ),
]
LedgerFile = Annotated[
    Path | None,
    Field(
        description="File of what the budgets have left. Without it: isthmus/ledger.db in XDG_STATE_HOME or"
        " ~/.local/state."
    ),
]


@dataclass(frozen=True)
class Tls(Settings):
    """How cloud and device show who they are: PEM files, and the device's token where the cloud knows it by one.

    `ca` signs the cloud's certificate; with `system` those do that this system trusts. `certificate` and `key` are the
    device's own, for mutual TLS. Files are read again when they change.
    """

    ca: Annotated[
        Path | None,
        Field(description="PEM file of the authority that signed the cloud's certificate; turns TLS on."),
        Flag("tls_ca", is_file=True),
    ] = None
    certificate: Annotated[
        Path | None,
        Field(description="PEM file with this device's certificate, for mutual TLS."),
        Flag("tls_certificate", is_file=True),
    ] = None
    key: Annotated[
        Path | None,
        Field(description="PEM file with the key of that certificate."),
        Flag("tls_key", is_file=True),
    ] = None
    system: Annotated[
        bool,
        Field(description="Turn TLS on, with the authorities that this system trusts where --tls-ca names none."),
        Flag("tls"),
    ] = False
    token_file: Annotated[
        Path | None,
        Field(description="File with this device's token, where the cloud knows devices by tokens."),
        Flag(is_file=True),
    ] = None
    token: Annotated[
        SecretStr | None,
        Field(description="The token itself; in the environment, since a command line can be seen by others."),
    ] = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidInput("--tls-certificate and --tls-key need each other")
        if (self.token_file or self.token) and not self.on:
            raise InvalidInput("a token needs --tls-ca or --tls, or everybody on the way to the cloud could read it")
        if self.certificate is not None and not self.on:
            raise InvalidInput("--tls-certificate needs --tls-ca, or --tls for the authorities of this system")

    @property
    def on(self) -> bool:
        """Whether TLS is used at all."""
        return self.system or self.ca is not None

    @property
    def secret(self) -> str:
        """The token, or an empty text. Raises InvalidInput for what cannot be one."""
        return read_secret(self.token_file, self.token, f"{PREFIX}_TOKEN", "a token")


@dataclass(frozen=True)
class WholeImage(Settings):
    """How a photo is stored when it is sent whole; without either, as the bundle's figures say is best."""

    form: Annotated[
        Literal["jpeg", "png", "webp"] | None,
        Field(description="Format of a photo that is sent whole. Without it: the router chooses."),
        Flag("image_format"),
    ] = None
    quality: Annotated[
        int | None,
        Field(
            ge=1,
            le=100,
            description="Quality of a photo that is sent whole as JPEG or WebP; PNG is lossless. Without it: the router"
            " chooses, or 75 of a given format.",
        ),
        Flag("image_quality"),
    ] = None


@dataclass(frozen=True)
class Audits(Settings):
    """How the exits' promise is checked while the agent runs."""

    share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of photos whose answer by an exit is checked by the cloud, at random and in the"
            " background; more while something looks odd. 0 for none.",
        ),
        Flag("audit_share"),
    ] = 0.01
    seed: Annotated[int, Field(ge=0, description="Seed of the choice of these photos."), Flag("audit_seed")] = 0
    recalibrate: Annotated[
        Literal["ask", "auto"],
        Field(
            description="After an alarm of these checks. ask: stricter thresholds until `edge-agent recalibrate` makes"
            " new ones. auto: the agent makes them itself when it has enough pairs."
        ),
    ] = "ask"
    drift: Annotated[
        Literal["audit", "stop", "off"],
        Field(
            description="When photos begin to look unlike those before. audit: many answers by exits are checked by the"
            " cloud for a while. stop: no exit answers meanwhile, either. off: photos are not compared."
        ),
    ] = "audit"
    folder: Annotated[
        Path | None,
        Field(
            description="Folder of the audited pairs' files. Without it: isthmus in XDG_STATE_HOME or ~/.local/state."
        ),
        Flag("audit_folder"),
    ] = None


@dataclass(frozen=True)
class EdgeConfig(Settings):
    """An agent for photos. `mode` other than auto pins one arm, for comparison.

    A request that names a tap, a width or a rate is sent so in any mode.
    """

    bundle: Annotated[
        Path,
        AfterValidator(find),
        Field(description="Vision bundle: a folder, or the name of an installed one.", validate_default=True),
    ] = Path("photos")
    clouds: Clouds = ()
    mode: Annotated[
        Mode,
        Field(
            description="auto: the router chooses for each photo. edge: the device alone. split: the bottleneck's"
            " features are sent. offload: the whole photo is sent."
        ),
    ] = "auto"
    precision: Annotated[Precision, Field(description="Precision of the head on the device.")] = "fp32"
    objective: Best = "fastest"
    weights: OwnWeights = OwnWeights()
    target_s: Annotated[
        float | None,
        Field(
            ge=MIN_DEADLINE_S,
            le=MAX_DEADLINE_S,
            description="Milliseconds within which the share --target-share of photos is to be answered. Without it:"
            " none.",
        ),
        Flag("target_ms", 1000),
    ] = None
    target_share: Annotated[
        float,
        Field(ge=0.5, le=0.9999, description="Share of photos that is to be answered within --target-ms."),
    ] = 0.95
    epsilon: Annotated[
        Share,
        Field(description="Certified loss of accuracy at the exits: it picks the bundle's confidence threshold."),
    ] = DEFAULT_EPSILON
    promise: Annotated[
        Promise,
        Field(
            description="What --epsilon is of. accuracy: exits that are wrong where the cloud model is right."
            " agreement: other answers than the cloud model's."
        ),
    ] = "accuracy"
    among: Annotated[
        Among, Field(description="Over which photos the loss is averaged: all, or those that an exit answers.")
    ] = "all"
    min_agreement: Annotated[
        Share,
        Field(
            description="Least agreement with the cloud model, on the calibration part, of what is sent: a bottleneck"
            " or a whole image. Where no bottleneck reaches it, the best one's is enough."
        ),
    ] = 0.96
    tasks: Annotated[
        tuple[str, ...],
        Field(description="Task of the bundle to answer; repeatable. Without any: the bundle's first."),
        Flag("task"),
    ] = ()
    deadline_s: Annotated[
        float,
        Field(ge=MIN_DEADLINE_S, le=MAX_DEADLINE_S, description="Milliseconds in which a photo is to be answered."),
        Flag("deadline_ms", 1000),
    ] = 1.0
    connect_s: ConnectSeconds = 2.0
    probe_bytes_per_hour: ProbeBytes = PROBE_BYTES_PER_HOUR
    threads: Threads = 0
    profile: Profile = "wifi"
    prices: Prices = Prices()
    budgets: Budgets = Budgets()
    ledger: LedgerFile = None
    whole_image: WholeImage = WholeImage()
    audits: Audits = Audits()
    breaker: BreakerLimits = BreakerLimits()
    tls: Tls | None = None
    require_signature: Annotated[
        str | None,
        Field(
            description="Public key of minisign (RW…), or its file: the bundle must be signed with it"
            " (`minisign -Sm manifest.json`). Without it: no signature is asked for."
        ),
        Flag(metavar="KEY"),
    ] = None


@dataclass(frozen=True)
class LanguageConfig(Settings):
    """An agent for prompts: with a model on the device, a cloud that holds the same one or another, or both."""

    model: Annotated[
        str | None,
        Field(
            description="The device's own language model: a GGUF file, a Hugging Face folder, a language bundle or its"
            " name, or smollm2. Without it, the cloud's model answers."
        ),
    ] = None
    clouds: Clouds = ()
    cloud_model: Annotated[
        str | None,
        Field(
            description="Name of the cloud's language model. Without it: its only one, or the one of --model's"
            " vocabulary."
        ),
    ] = None
    device_bits: Annotated[Literal[4, 8], Field(description="Bits of each weight of the device's model.")] = 8
    draft: Annotated[
        Literal["model", "lookup"],
        Field(description="Drafts for the arm verify: by the device's model, or by looking up n-grams in the prompt."),
    ] = "model"
    handoff: Annotated[
        Path | None,
        AfterValidator(lambda path: path and find(path)),
        Field(
            description="Handoff bundle of --model (a folder or a name), for the arms handoff and auto; the cloud holds"
            " the same model."
        ),
    ] = None
    router: Annotated[
        Path | None,
        AfterValidator(lambda path: path and find(path)),
        Field(
            description="Router bundle of --model and the cloud's model (a folder or a name), for the arms auto and"
            " cascade. Without it: the installed one that was made for both."
        ),
    ] = None
    quality: Annotated[
        Share,
        Field(
            description="Arm auto: share of an answer's tokens that are to be those of the cloud's model. Arm cascade:"
            " share of answers that are to be acceptable."
        ),
    ] = 0.99
    objective: Best = "fastest"
    profile: Profile = "wifi"
    prices: Prices = Prices()
    budgets: Budgets = Budgets()
    ledger: LedgerFile = None
    agreement: Annotated[
        Share,
        Field(description="Agreement with the full model of tokens that exits decide: it picks their thresholds."),
    ] = 0.97
    state_point: Annotated[
        int | None,
        Field(ge=0, description="Operating point at which hidden states are sent. Without it: the cheapest good one."),
    ] = None
    fill: Annotated[
        bool,
        Field(
            description="Let the cloud approximate keys and values of tokens that exits decided: faster, less exact."
        ),
    ] = False
    prefill_layers: Annotated[
        int,
        Field(ge=0, le=512, description="Layers of the cloud's model that a prompt runs through; 0 for all, exact."),
    ] = 0
    kv_bits: Annotated[
        Literal[8, 32], Field(description="Bits of each key and value in the KV caches of the device's model.")
    ] = 32
    keep_graphs: Annotated[
        bool,
        Field(description="Keep the graphs of the device's model on disk, so that the next start does not build them."),
    ] = True
    graphs: Annotated[
        Path | None,
        Field(description="Folder of these graphs. Without it: isthmus/graphs in XDG_CACHE_HOME or ~/.cache."),
    ] = None
    context: Annotated[int, Field(ge=16, description="Tokens that the device's model holds.")] = 2048
    max_answers: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Prompts answered at once over HTTP by the device alone, and as many with a cloud; each keeps a"
            " KV cache on the device.",
        ),
    ] = 4
    on_loss: Annotated[
        Literal["alone", "wait"],
        Field(description="When no cloud is left in mid-answer: the device goes on alone, or waits for one."),
    ] = "alone"
    wait_s: Annotated[float, Field(ge=0, le=3600, description="Seconds to wait then, with --on-loss wait.")] = 30.0
    connect_s: ConnectSeconds = 2.0
    probe_bytes_per_hour: ProbeBytes = PROBE_BYTES_PER_HOUR
    threads: Threads = 0
    tls: Tls | None = None


@dataclass(frozen=True)
class ChatConfig(Settings):
    """A chat in the terminal."""

    arm: Annotated[
        Arm,
        Field(
            description="How answers are made. auto: the router chooses, token by token. edge: by the device. cloud: by"
            " the cloud. verify: drafted by the device, checked by the cloud. handoff: easy tokens by the device."
            " cascade: whole answers by the device, or by the cloud where those are not good enough."
        ),
    ] = "auto"
    system: Annotated[str, Field(description="System message: what the model reads before the first question.")] = ""
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Longest answer. Without it: what the context leaves.")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=2, description="Sampling temperature; 0 is greedy.")] = 0.0
    seed: Annotated[int, Field(ge=0, description="Seed of the sampling.")] = 0


@dataclass(frozen=True)
class HttpConfig(Settings):
    """Where the local HTTP API listens, what it admits, and how it ends."""

    listen: Annotated[
        ListenAddress,
        Field(description="Address of the HTTP API; port 0 picks a free one."),
        Flag(metavar="HOST:PORT"),
    ] = "127.0.0.1:8080"
    allowed_hosts: Annotated[
        tuple[str, ...],
        Field(
            description="Name by which clients may address the agent, beside IP addresses, localhost and the host of"
            " --listen; repeatable. Without any, an agent that listens beyond loopback answers to every name, but not"
            " to web pages."
        ),
        Flag("allowed_host"),
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...],
        Field(
            description="Origin of web pages that may use the API from a browser, such as https://app.example.org;"
            " repeatable. Without any, only pages that the agent's own address serves."
        ),
        Flag("allowed_origin"),
    ] = ()
    max_requests: Annotated[
        int,
        Field(ge=1, le=4096, description="Photos, and prompts, that are worked on or wait at once; above it 503."),
    ] = 32
    max_connections: Annotated[
        int,
        Field(ge=8, le=65536, description="Open connections, but at most a quarter of the file descriptors."),
    ] = 256
    client_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="Seconds for a client to send the head of a request, again for its body, and to read an answer"
            " that fills the buffers.",
        ),
    ] = 30.0
    drain_s: Annotated[
        float, Field(ge=0, le=600, description="Seconds to answer the requests in flight after SIGTERM.")
    ] = 20.0
    api_token_file: Annotated[
        Path | None,
        Field(description="File with a token that clients must send, as OpenAI's do: Authorization: Bearer …"),
        Flag(is_file=True),
    ] = None
    api_token: Annotated[
        SecretStr | None,
        Field(description="The token itself; in the environment, since a command line can be seen by others."),
    ] = None

    @property
    def secret(self) -> str:
        """The token, or an empty text. Raises InvalidInput for what cannot be one."""
        return read_secret(self.api_token_file, self.api_token, f"{PREFIX}_API_TOKEN", "a token")


def proxy_variable() -> str | None:
    """The name in the environment whose proxy gRPC connects through; its value may hold a password."""
    return next((name for name in PROXIES if os.environ.get(name)), None)
