"""Jobs: the generation requests of a body for the backend, and how to format their answers.

Where OpenAI leaves it open: `seed` is taken modulo 2^63, and choice i of a prompt uses seed + i, as all choices would
be equal otherwise; `max_tokens` is cut to what is left of the context; `private` (or the header X-Isthmus-Private)
keeps a request on the device; temperature and top_p are by default what the model's makers recommend.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from isthmus.edge_agent.http.openai.errors import CONTEXT_CODE, TOO_LONG, ApiError
from isthmus.edge_agent.http.openai.formats import token_biases
from isthmus.edge_agent.http.openai.model_names import SelectedModel
from isthmus.edge_agent.http.openai.schema import BaseRequest
from isthmus.edge_agent.http.openai.tools import ToolUse
from isthmus.edge_agent.language.request import GenerationBackend, GenerationRequest
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import ContextExceeded
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.tool_format import CLOSE
from isthmus.models.messages import MAX_SEED, Grammar, Sampling

MIN_TOP_P = 1e-9  # stands for 0, which OpenAI allows: the likeliest token alone

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request: `n` choices for each prompt in turn. `echoed_prompts` has the text before each choice.

    `tools`: what the answers may call. `scores_prompts`: prompts are echoed with their log probabilities. `echoed`:
    fields of the request that the response repeats. `grammar_field`: the one at fault where a grammar cannot be used.
    """

    kind: Kind
    model: str
    arm: Arm
    requests: tuple[GenerationRequest, ...]
    n: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echoed_prompts: tuple[str, ...]
    tokenizer: Tokenizer
    tools: ToolUse | None = None
    grammar_field: str = "response_format"
    scores_prompts: bool = False
    echoed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all_stops(self) -> tuple[str, ...]:
        """With what ends the only call that the answer may hold."""
        one_call = self.tools is not None and not self.tools.parallel
        return (*self.stops, CLOSE) if one_call else self.stops


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """What all choices of a job share. `max_tokens` may exceed `context`, in tokens."""

    model: SelectedModel
    max_tokens: int
    top_logprobs: int | None
    context: int
    tokenizer: Tokenizer
    grammar: Grammar | None = None
    prediction: tuple[int, ...] = ()


Encode = Callable[[Tokenizer], Sequence[int]]
JobParser = Callable[[bytes, bool, GenerationBackend], Job]


def requests_for(
    body: BaseRequest, prompt: tuple[int, ...], settings: ChoiceSettings, param: str, encode: Encode
) -> list[GenerationRequest]:
    """`n` requests for one prompt, which `encode` encodes by another tokenizer.

    Raises ApiError where it is empty or leaves no room for an answer.
    """
    if not prompt:
        raise ApiError(400, f"{param}: the prompt is empty", param=param)
    room = settings.context - len(prompt)
    if room < min(settings.max_tokens, 1):
        message = (
            f"{TOO_LONG} {settings.context} tokens; the prompt has {len(prompt)}, which leaves no room for an answer"
        )
        raise ApiError(400, message, param=param, code=CONTEXT_CODE)
    max_tokens, model, tokenizer = min(settings.max_tokens, room), settings.model, settings.tokenizer
    shared = GenerationRequest(
        prompt,
        max_tokens,
        model.arm,
        top_logprobs=settings.top_logprobs,
        quality=model.quality,
        vocabulary=tokenizer.vocabulary,
        prediction=settings.prediction,
        encode=encode,
    )
    return [replace(shared, sampling=sampling) for sampling in samplings(body, settings)]


def samplings(body: BaseRequest, settings: ChoiceSettings) -> list[Sampling]:
    """One for each of the `n` choices; what the request does not give is as the model's makers recommend."""
    recommended = settings.tokenizer.sampling
    seed = secrets.randbits(63) if body.seed is None else body.seed
    temperature = recommended.temperature if body.temperature is None else body.temperature
    top_p = recommended.top_p if body.top_p is None else max(body.top_p, MIN_TOP_P)
    shared = Sampling(
        temperature,
        top_p,
        logit_bias=token_biases(body.logit_bias, settings.tokenizer),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        grammar=settings.grammar,
    )
    return [replace(shared, seed=(seed + index) % (MAX_SEED + 1)) for index in range(body.n)]


@contextmanager
def naming(param: str) -> Iterator[None]:
    """The field at fault, in the error of a prompt that is too long. Raises ApiError."""
    try:
        yield
    except ContextExceeded as error:
        raise ApiError(400, f"{param}: {TOO_LONG} exceeded: {error}", param=param, code=CONTEXT_CODE) from None


def build_job(
    kind: Kind,
    body: BaseRequest,
    settings: ChoiceSettings,
    requests: Sequence[GenerationRequest],
    echoed_prompts: Sequence[str],
    *,
    tools: ToolUse | None = None,
    scores_prompts: bool = False,
) -> Job:
    return Job(
        kind=kind,
        model=settings.model.name,
        arm=settings.model.arm,
        requests=tuple(requests),
        n=body.n,
        stops=tuple(body.stop),
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        echoed_prompts=tuple(echoed_prompts),
        tokenizer=settings.tokenizer,
        tools=tools,
        grammar_field="tools" if tools else "response_format",
        scores_prompts=scores_prompts,
    )
