"""A dialect translates between choices and one server's HTTP requests and answers. Pure: it sends nothing.

ids, sampling, limit ── stream_call ──> Call ··· events ── StreamReader.read ──> choices
ids, start           ── score_call  ──> Call ··· answer ── read_scores       ──> choices
                                                        ── read_prompt       ──> log-probabilities of ids
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from isthmus.cloud_service.language.engines.answers import listed, mapping
from isthmus.cloud_service.language.engines.protocol import Choice, EngineIdentity
from isthmus.models.errors import EngineDown
from isthmus.models.messages import Logprobs, Processor, Sampling

MODELS = "/v1/models"  # of vLLM, SGLang, and whatever calls itself compatible with OpenAI
MIN_TOP = 2  # likeliest tokens of a scored position: equal ones are told apart by their ids
MAX_NAMES = 200  # characters of a list of models
MAX_NAME = 512  # of one: it may be a path


PENALTIES: tuple[Processor, ...] = ("logit_bias", "penalties")  # which OpenAI's completions have


def penalty_fields(sampling: Sampling) -> dict[str, Any]:
    """Biases and penalties as OpenAI writes them, and others with it; none where none are asked for."""
    fields: dict[str, Any] = {}
    if sampling.logit_bias:
        fields["logit_bias"] = {str(id_): bias for id_, bias in sampling.logit_bias}
    if "penalties" in sampling.processors:
        fields["frequency_penalty"] = sampling.frequency_penalty
        fields["presence_penalty"] = sampling.presence_penalty
    return fields


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request: POST of a JSON object, or GET without one."""

    path: str
    body: dict[str, Any] | None = None


class StreamReader(Protocol):
    """Reads the events of one stream. `finished`: the engine has said that nothing follows."""

    finished: bool

    def read(self, event: bytes) -> list[Choice]:
        """The choices that an event brings, possibly none. Raises EngineFault."""
        ...


class Dialect(Protocol):
    """Of one server. `scores`, `logprobs`, `processors`: what it can be asked for."""

    scores: bool
    logprobs: bool
    processors: tuple[Processor, ...]
    ping: Call

    def tokens_call(self, model: str, text: str) -> Call | None:
        """A request that makes it tokenize; None where there is none."""
        ...

    def read_tokens(self, answer: dict[str, Any]) -> list[int]: ...

    def stream_call(
        self, model: str, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> tuple[Call, StreamReader]: ...

    def score_call(self, model: str, ids: Sequence[int], start: int, top: int | None) -> Call: ...

    def read_scores(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int | None) -> list[Choice]: ...

    def read_prompt(self, answer: dict[str, Any], ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        """Of the text's own tokens, from the answer to a `score_call`."""
        ...


class Probe(Protocol):
    """Finds out what a server of an unknown kind can do."""

    def call(self, model: str) -> Call: ...

    def dialect(self, answer: dict[str, Any] | None) -> Dialect:
        """How to speak to a server that sent this answer; None: it refused."""
        ...


def read_models(answer: dict[str, Any], chosen_name: str | None) -> EngineIdentity:
    """The model to use among those that a server lists. Raises EngineDown naming those where it is not clear."""
    cards = [mapping(card, "model") for card in listed(answer.get("data"), "models")]
    held = {card["id"]: card for card in cards if is_name(card.get("id"))}
    names = ", ".join(held)[:MAX_NAMES] or "none"
    if chosen_name is not None and chosen_name not in held:
        raise EngineDown(f"the engine does not hold the model {chosen_name}, it holds {names}")
    if chosen_name is None and len(held) != 1:
        raise EngineDown(f"the engine holds {names}: name the model with --engine-model")
    name = chosen_name or next(iter(held))
    context = held[name].get("max_model_len")
    return EngineIdentity(name, context if type(context) is int and context > 0 else 0)


def is_name(value: Any) -> bool:
    """Whether it can be told to devices, and logged in one line."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()
