"""Requests for text and what answers are made of: tokens, and a summary at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.sampling import Floats, logprobs
from isthmus.models.messages import GREEDY, NOTHING, Logprobs, Processed, Sampling

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer

Source = Literal["edge", "cloud", "draft"]  # draft: drafted on the device, accepted by the cloud


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for one answer.

    top_logprobs: None for no log probabilities, 0 for the token's own, n for the n likeliest as well. quality, for
    auto: the share of tokens that are what the cloud's model would choose, for cascade: the share of answers that are
    acceptable; None for the owner's. vocabulary: of the tokenizer that encoded the prompt; empty for the one that
    `tokenizer_for(arm)` gives. prediction: tokens that the answer is expected to repeat in large part, which are drafts
    of verify. encode: the same prompt by another tokenizer; where whole answers are routed between two vocabularies it
    is needed.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    arm: Arm
    sampling: Sampling = GREEDY
    top_logprobs: int | None = None
    quality: float | None = None
    vocabulary: bytes = b""
    prediction: tuple[int, ...] = ()
    encode: Callable[[Tokenizer], Sequence[int]] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Token:
    """A committed token: it will not be taken back. `top` holds (id, log probability), likeliest first.

    `tokenizer`: whose ids these are; None: that of the prompt.
    """

    id: int
    source: Source
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    tokenizer: Tokenizer | None = None


def local_token(logits_V: Floats, id_: int, request: GenerationRequest) -> Token:
    """A token that the local model decided by these logits."""
    if request.top_logprobs is None:
        return Token(id_, "edge")
    return Token(id_, "edge", *logprobs(logits_V, id_, request.top_logprobs))


def cloud_token(id_: int, source: Source, logprobs_: Logprobs | None) -> Token:
    """A token that the cloud decided or accepted, with its log probabilities."""
    return Token(id_, source, logprobs_.own if logprobs_ else None, logprobs_.top if logprobs_ else ())


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one arm, and why it was that one."""

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
    accepted: int = 0  # draft tokens that the cloud accepted
    rejected: int = 0
    rounds: int = 0  # answered by the cloud
    passes: int = 0  # forward passes in the cloud that decided tokens
    prefill_passes: int = 0  # those that only read the prompt
    opening_bytes: int = 0  # of bytes_up: the prompt, mostly
    cached: int = 0  # prompt tokens whose KV cache the cloud still held
    bytes_up: int = 0
    bytes_down: int = 0
    rtt_s: float | None = None
    cloud_s: float = 0.0  # queue and compute
    degraded: bool = False  # the cloud was lost, and the device went on alone
    spans: tuple[Span, ...] = ()  # of an answer by auto or cascade
    device: Processed = NOTHING  # by the device's model; exits count their own layers too
    cloud: Processed = NOTHING  # by the cloud's model for this session, as far as its replies have told


class GenerationBackend(Protocol):
    """What generates answers, as its callers see it. LanguageAgent is the one that we ship."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the model."""

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        """What encodes prompts for an arm, and decodes its answers. Raises IsthmusError while it is not known."""

    def arm_context(self, arm: Arm) -> int:
        """Tokens of prompt and answer together, by this arm."""

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be requested now: without a cloud only edge, and auto, which then is edge."""

    def score(self, request: GenerationRequest, cancelled: threading.Event | None = None) -> list[Token]:
        """The prompt's tokens with log probabilities, of which the first has none. Raises IsthmusError."""

    def generate(
        self, request: GenerationRequest, cancelled: threading.Event | None = None
    ) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. A generator that blocks; closing it ends the cloud session.

        `cancelled`, set from another thread, ends a wait for the device's model or the cloud. Raises IsthmusError.
        """
