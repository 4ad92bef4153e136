"""Frozen values that packages exchange, of both wings. No behaviour beyond what their fields imply.

photos      CloudRequest (a Payload and the tasks wanted) -> CloudReply
language    Opening, then Round ... -> Committed ...
Describe    ServiceInfo: a BundleInfo for each bundle, a ModelInfo for each language model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from isthmus.models.errors import InvalidInput

SESSION_BYTES = 16
MAX_SEED = (1 << 63) - 1
MAX_TOKENIZER_BYTES = 64 << 20  # Llama 3's tokenizer.json has 17 MB
MAX_GRAMMAR_BYTES = 64 << 10  # UTF-8 of a grammar's text; the schemas of published tools have below 10,000
MAX_LOGIT_BIASES = 300  # tokens; the limit of the OpenAI API
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0

Numerics = Literal["bitwise", "engine"]
TaskKind = Literal["classify", "detect", "segment", "embed"]
DTypeName = Literal["float32", "float16", "uint16", "uint32"]
CloudArm = Literal["cloud", "verify", "handoff"]
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
Processor = Literal["logit_bias", "penalties", "json_object", "json_schema", "regex", "lark"]


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


@dataclass(frozen=True, slots=True, eq=False)
class OutputTensor:
    """One named array of an answer that is no class probabilities. Its element type is a DTypeName."""

    name: str
    array: NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorBound:
    """What an OutputTensor must be. `at_most`: its first size may be smaller."""

    name: str
    dtype: DTypeName
    shape: tuple[int, ...]
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class OutputBounds:
    """What the tensors of one task must be, in order; `check` raises ValueError for values that no answer has."""

    tensors: tuple[TensorBound, ...]
    check: Callable[[Sequence[NDArray[Any]]], None]


@dataclass(frozen=True, slots=True)
class CloudReply:
    """What the cloud found of each requested task, in the bundle's order, and its time in seconds.

    probabilities: of each task that classifies. outputs: of the others.
    """

    probabilities: tuple[tuple[float, ...], ...]
    queue_s: float
    compute_s: float
    outputs: tuple[OutputTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task of a bundle, the number of its classes (of a vector its size), and its kind."""

    name: str
    labels: int
    kind: TaskKind = "classify"


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
class Grammar:
    """What the text of an answer has to be.

    json_object: any JSON object, without a text. json_schema, regex, lark: what `text` describes. Raises InvalidInput
    for an unknown kind, or a text that is too long; whether it can be used is seen when it is compiled.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise InvalidInput(f"grammar kind {self.kind!r}, expected one of {', '.join(get_args(GrammarKind))}")
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json_object"):
            raise InvalidInput(f"a grammar of kind {self.kind} {'has no' if self.text else 'needs a'} text")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidInput(f"the grammar holds a lone surrogate at character {error.start}") from error
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidInput(f"the grammar has {size} bytes, expected at most {MAX_GRAMMAR_BYTES}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy. Raises InvalidInput for values out of range.

    logit_bias: (token id, added to its logit), each id once. frequency_penalty, presence_penalty: as OpenAI has them,
    over the tokens of the answer. grammar: None for free text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature <= 2:
            raise InvalidInput(f"temperature is {self.temperature!r}, expected 0 to 2")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p is {self.top_p!r}, expected above 0, at most 1")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed <= MAX_SEED:
            raise InvalidInput(f"seed is {self.seed!r}, expected 0 to {MAX_SEED}")
        for name, penalty in (("frequency", self.frequency_penalty), ("presence", self.presence_penalty)):
            if not isinstance(penalty, int | float) or not abs(penalty) <= MAX_PENALTY:
                raise InvalidInput(f"{name}_penalty is {penalty!r}, expected {-MAX_PENALTY:.0f} to {MAX_PENALTY:.0f}")
        check_biases(self.logit_bias)
        if not (self.grammar is None or isinstance(self.grammar, Grammar)):
            raise InvalidInput(f"grammar is {type(self.grammar).__name__}, expected a Grammar")

    @property
    def processors(self) -> tuple[Processor, ...]:
        """What has to be applied to logits before a token is chosen, by name."""
        found: list[Processor] = ["logit_bias"] if self.logit_bias else []
        if self.frequency_penalty or self.presence_penalty:
            found.append("penalties")
        return (*found, self.grammar.kind) if self.grammar else tuple(found)

    @property
    def reads_answer(self) -> bool:
        """Whether a choice depends on the answer's tokens so far."""
        return self.grammar is not None or bool(self.frequency_penalty or self.presence_penalty)


def check_biases(biases: Sequence[tuple[int, float]]) -> None:
    """Raises InvalidInput for anything but biases within their bounds."""
    if not isinstance(biases, tuple) or len(biases) > MAX_LOGIT_BIASES:
        raise InvalidInput(f"logit_bias is a tuple of at most {MAX_LOGIT_BIASES} pairs of token id and bias")
    for pair in biases:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidInput(f"logit_bias holds {pair!r}, expected pairs of token id and bias")
        id_, bias = pair
        if not isinstance(id_, int) or not 0 <= id_ < 1 << 32:
            raise InvalidInput(f"logit_bias names {id_!r}, expected a token id")
        if not isinstance(bias, int | float) or not abs(bias) <= MAX_LOGIT_BIAS:
            raise InvalidInput(
                f"logit_bias of token {id_} is {bias!r}, expected {-MAX_LOGIT_BIAS:.0f} to {MAX_LOGIT_BIAS:.0f}"
            )
    if len({id_ for id_, _ in biases}) < len(biases):
        raise InvalidInput("logit_bias names a token twice")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Opening:
    """Opens a session of `start` + len(tokens) tokens, of which the cloud should already hold the first `start`.

    `answer_start`: position where the answer begins, for sampling that depends on its tokens; else 0. `logprobs` None:
    none; n: of each committed token and of the n likeliest. `handoff`: fingerprint, or its first 8 bytes, of the bundle
    whose hidden states the rounds carry; then `tokens` is empty. A state from which a token is or was decoded is coded
    at `rate`, those that others only attend to at `context_rate`.
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
    answer_start: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """Draft tokens that follow position `base`; after verifying them the cloud may decode `extend` tokens by itself.

    With `score` the draft is committed without verification, and its log-probabilities come back.
    With `states`, one for each draft token, the draft is committed without verification, and `extend` 1 requests the
    token after it, decoded from the last state. `decoded_from`: states from which a token was decoded before.
    """

    base: int
    draft: tuple[int, ...] = ()
    extend: int = 0
    states: tuple[bytes, ...] = ()
    decoded_from: tuple[int, ...] = ()
    score: bool = False


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
    processors: tuple[Processor, ...] = ()  # what its choices can be made with
    scores: bool = False  # whether it gives log-probabilities of a text that the device sends


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
