"""What flows between the prompt loop and those who ask it: the HTTP API, the chat, the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.sampling import Floats, choose, logprobs
from isthmus.models.messages import GREEDY, Logprobs, Sampling

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer

Source = Literal["edge", "cloud", "draft"]  # draft: made on the device and confirmed by the cloud


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer wanted. `top_logprobs` None: no log probabilities; 0: the token's own; n: the n likeliest as well.

    `quality`, for auto: the share of its tokens that are to be what the cloud's model would choose; None: the owner's.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    arm: Arm
    sampling: Sampling = GREEDY
    top_logprobs: int | None = None
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A committed token: it will not be taken back. `top` holds (id, log probability), likeliest first."""

    id: int
    source: Source
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def local_token(logits_V: Floats, ask: GenerationRequest, position: int) -> Token:
    """A token that the local model decides."""
    id_ = choose(logits_V, ask.sampling, position)
    if ask.top_logprobs is None:
        return Token(id_, "edge")
    return Token(id_, "edge", *logprobs(logits_V, id_, ask.top_logprobs))


def cloud_token(id_: int, source: Source, row: Logprobs | None) -> Token:
    """A token that the cloud decided or confirmed, with what it said of it."""
    return Token(id_, source, row.own if row else None, row.top if row else ())


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens in a row that one arm made, and why it was that one."""

    arm: Arm
    tokens: int
    why: str


@dataclass(frozen=True, slots=True)
class Summary:
    """How an answer came to be. Counts of tokens, bytes of our messages with gRPC's prefix, seconds."""

    finish: Literal["stop", "length"]  # end-of-text token, or max_tokens
    prompt_tokens: int
    tokens: int
    arm: Arm
    why: str  # of the arm or of a change of it in mid-answer
    accepted: int = 0  # draft tokens that the cloud confirmed
    rejected: int = 0
    rounds: int = 0  # that the cloud answered
    passes: int = 0  # forward passes in the cloud that decided tokens
    prefill_passes: int = 0  # those that only read the prompt
    opening_bytes: int = 0  # of bytes_up: the prompt, mostly
    cached: int = 0  # prompt tokens whose state the cloud still held
    bytes_up: int = 0
    bytes_down: int = 0
    rtt_s: float | None = None
    cloud_s: float = 0.0  # queue and compute
    degraded: bool = False  # the cloud was lost, and the device went on alone
    spans: tuple[Span, ...] = ()  # of an answer by auto


class Generator(Protocol):
    """The prompt loop, as those who ask it see it."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be asked for now: without a cloud only edge, and auto, which is edge then."""

    def generate(self, ask: GenerationRequest) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. A generator that blocks; closing it ends the cloud session.

        Raises IsthmusError.
        """
