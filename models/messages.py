"""Frozen values that packages exchange, of both wings. No behaviour beyond what their fields imply.

photos      CloudRequest (a Payload and the tasks wanted) -> CloudReply
language    Opening, then Round ... -> Committed ...
Describe    ServiceInfo: a BundleInfo for each bundle, a ModelInfo for each language model
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import Literal

from isthmus.models.errors import InvalidInput

SESSION_BYTES = 16
MAX_SEED = (1 << 63) - 1
MAX_TOKENIZER_BYTES = 64 << 20  # Llama 3's tokenizer.json has 17 MB

Numerics = Literal["bitwise", "engine"]
CloudArm = Literal["cloud", "verify", "handoff"]


class Codec(IntEnum):
    """The kind of a payload. The numbers are on the wire."""

    BOTTLENECK = 1  # integers of a tap, rANS-coded with the bundle's integer tables
    IMAGE = 2  # a whole JPEG, PNG or WebP file


@dataclass(frozen=True, slots=True)
class Payload:
    """The data sent for one input. `tap` indexes the bundle's taps, `rate` the tap's; 0 for a whole image."""

    codec: Codec
    tap: int
    rate: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """One input for the cloud. `budget_s` is how long the device will wait, counted from sending.

    `tasks` index the bundle's tasks, in rising order: those to compute.
    """

    request_id: int
    fingerprint: bytes
    budget_s: float
    payload: Payload
    tasks: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class CloudReply:
    """Class probabilities of each requested task, in the bundle's order, and the cloud's time in seconds."""

    probabilities: tuple[tuple[float, ...], ...]
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task of a bundle, and the number of its classes."""

    name: str
    labels: int


@dataclass(frozen=True, slots=True)
class TapInfo:
    """A bottleneck of a bundle, and the number of its rates."""

    name: str
    rates: int


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """A service's description of a bundle it holds. `fingerprint` is the whole SHA-256, 32 bytes."""

    fingerprint: bytes
    name: str
    tasks: tuple[TaskInfo, ...]
    taps: tuple[TapInfo, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. `temperature` 0 is greedy. Raises InvalidInput for values out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature <= 2:
            raise InvalidInput(f"temperature is {self.temperature!r}, expected 0 to 2")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p is {self.top_p!r}, expected above 0, at most 1")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed <= MAX_SEED:
            raise InvalidInput(f"seed is {self.seed!r}, expected 0 to {MAX_SEED}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Opening:
    """Opens a session of `start` + len(tokens) tokens, of which the cloud should already hold the first `start`.

    `logprobs` None: none; n: of each committed token and of the n likeliest. `handoff`: fingerprint, or its first 8
    bytes, of the bundle whose hidden states the rounds carry; then `tokens` is empty. A state from which a token is or
    was decoded is coded at `rate`, those that others only attend to at `context_rate`.
    """

    model: bytes
    session: bytes
    start: int
    tokens: tuple[int, ...]
    crc32: int  # of all tokens of the session
    sampling: Sampling = GREEDY
    logprobs: int | None = None
    handoff: bytes = b""
    rate: int = 0
    context_rate: int = 0
    prefill_layers: int = (
        0  # of positions from which no token is decoded; the KV of other layers is approximated; 0: all
    )


@dataclass(frozen=True, slots=True)
class Round:
    """Draft tokens that follow position `base`; after verifying them the cloud may decode `extend` tokens by itself.

    With `states`, one for each draft token, the draft is committed without verification, and `extend` 1 requests the
    token after it, decoded from the last state. `decoded_from`: states from which a token was decoded before.
    """

    base: int
    draft: tuple[int, ...] = ()
    extend: int = 0
    states: tuple[bytes, ...] = ()
    decoded_from: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural, temperature 1): of the committed token, and (id, value) of the likeliest ones."""

    own: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Processed:
    """What a model computed: `tokens`, of which it had processed the `repeated` before, and floating-point operations.

    `flops` 0 with tokens: not known.
    """

    tokens: int = 0
    flops: int = 0
    repeated: int = 0

    def __add__(self, other: Processed) -> Processed:
        return Processed(self.tokens + other.tokens, self.flops + other.flops, self.repeated + other.repeated)

    def __sub__(self, other: Processed) -> Processed:
        return Processed(self.tokens - other.tokens, self.flops - other.flops, self.repeated - other.repeated)


NOTHING = Processed()


@dataclass(frozen=True, slots=True)
class Committed:
    """The tokens after position `base` are the first `accepted` of the draft, then `tokens`.

    `base` is the round's; `accepted` and `tokens` include tokens committed before the round arrived, `logprobs` only
    the new ones, which are the last. If both are empty, the draft was stale and `base` is the length of the sequence,
    or the sequence has ended.

    For a round with states: its `base`, and in `tokens` the token after its draft, if requested. `processed`: for the
    session, since its last reply.
    """

    base: int
    accepted: int = 0
    tokens: tuple[int, ...] = ()
    extension: bool = False
    queue_s: float = 0.0
    compute_s: float = 0.0
    passes: int = 0
    held: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    processed: Processed = NOTHING


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """A model's tokenizer: SHA-256 and size of its serialised form. Where `vocabulary` is equal, ids mean the same."""

    sha256: bytes
    size_bytes: int
    vocabulary: bytes


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a service declares of a language model that it can use.

    `fingerprint`: of the weights where the service holds them, else of what it declares. `numerics`: "bitwise" where
    verified and streamed tokens are equal by construction; "engine" for greedy choices of an engine, which differed at
    `mismatched` of `compared` tokens.
    """

    fingerprint: bytes
    name: str
    vocab: int
    context: int
    numerics: Numerics
    tokenizer: TokenizerInfo
    end_ids: tuple[int, ...]
    arms: tuple[CloudArm, ...]
    precision: str = ""  # data type and rows of a forward pass
    handoffs: tuple[bytes, ...] = ()  # fingerprints of the handoff bundles whose hidden states it accepts
    compared: int = 0
    mismatched: int = 0


def describe_model(info: ModelInfo) -> str:
    """A model of an engine in words, for people who operate a service."""
    arms = ", ".join(info.arms)
    if not info.compared:
        return f"{info.name}, context {info.context}, {arms}"
    found = f"{info.mismatched} of {info.compared} tokens differed between streaming and verifying"
    return f"{info.name}, context {info.context}, {arms}; {found}"


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service's description of itself."""

    version: str
    wire_version: int
    bundles: tuple[BundleInfo, ...]
    models: tuple[ModelInfo, ...] = ()
    problems: tuple[str, ...] = ()  # why models that it should have cannot be used now
