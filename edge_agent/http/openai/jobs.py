"""From the body of a request to a Job: the generation requests for the backend, and how to format their answers.

Where OpenAI leaves it open: `seed` is taken modulo 2^63, and choice i of a prompt uses seed + i, as all choices would
be equal otherwise; `max_tokens` is cut to what is left of the context; `private` (or the header X-Isthmus-Private)
keeps a request on the device; temperature and top_p are by default what the model's makers recommend.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.model_names import SelectedModel, select_model
from isthmus.edge_agent.http.openai.schema import BaseRequest, ChatRequest, CompletionRequest, parse_request
from isthmus.edge_agent.language.request import GenerationBackend, GenerationRequest
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import ContextExceeded
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.messages import MAX_SEED, Sampling

MAX_CHOICES = 128  # of all prompts of a request together: they are generated one after the other
DEFAULT_COMPLETION_TOKENS = 16
MIN_TOP_P = 1e-9  # stands for 0, which OpenAI allows: the likeliest token alone

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request: `n` choices for each prompt in turn. `echoed_prompts` has the text before each choice."""

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


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """What all choices of a job share. `max_tokens` may exceed `context`, in tokens."""

    model: SelectedModel
    max_tokens: int
    top_logprobs: int | None
    context: int
    tokenizer: Tokenizer


Encode = Callable[[Tokenizer], Sequence[int]]
JobParser = Callable[[bytes, bool, GenerationBackend], Job]


def chat_job(data: bytes, private: bool, backend: GenerationBackend) -> Job:
    """The job of a body of /v1/chat/completions. Raises ApiError."""
    body = parse_request(ChatRequest, data)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    model = select_model(body, private or body.private, backend)
    tokenizer = backend.tokenizer_for(model.arm)
    context = backend.arm_context(model.arm)
    messages = [Message(message.role, message.content or "") for message in body.messages]
    with naming("messages"):
        prompt = tokenizer.chat(messages, context)
    max_tokens = body.max_completion_tokens or body.max_tokens or context
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    settings = ChoiceSettings(model, max_tokens, top_logprobs, context, tokenizer)
    requests = requests_for(body, tuple(prompt), settings, "messages", lambda other: other.chat(messages, context))
    return build_job("chat", body, settings, requests, ("",) * len(requests))


def completion_job(data: bytes, private: bool, backend: GenerationBackend) -> Job:
    """The job of a body of /v1/completions. Raises ApiError."""
    body = parse_request(CompletionRequest, data)
    check_completion(body)
    model = select_model(body, private or body.private, backend)
    tokenizer = backend.tokenizer_for(model.arm)
    max_tokens, context = body.max_tokens or DEFAULT_COMPLETION_TOKENS, backend.arm_context(model.arm)
    settings = ChoiceSettings(model, max_tokens, body.logprobs, context, tokenizer)
    requests: list[GenerationRequest] = []
    echoed_prompts: list[str] = []
    for prompt in body.prompt:
        ids = encode_prompt(prompt, tokenizer, context)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        requests += requests_for(body, ids, settings, "prompt", partial(encoded, text))
        echoed_prompts += [text if body.echo else ""] * body.n
    return build_job("completion", body, settings, requests, echoed_prompts)


def check_completion(body: CompletionRequest) -> None:
    """Raises ApiError 400 for fields that are valid each, but not together."""
    if body.best_of > body.n:
        raise ApiError(400, f"best_of is {body.best_of}, expected at most n ({body.n})", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo is not supported together with logprobs", param="echo")
    if len(body.prompt) * body.n > MAX_CHOICES:
        message = f"{len(body.prompt)} prompts with n = {body.n} have more than {MAX_CHOICES} choices"
        raise ApiError(400, message, param="prompt")


def encode_prompt(prompt: str | Sequence[int], tokenizer: Tokenizer, context: int) -> tuple[int, ...]:
    """The ids of a prompt, which may be given as ids. Raises ApiError for an id outside of the vocabulary."""
    if isinstance(prompt, str):
        with naming("prompt"):
            tokenizer.check_length(prompt, context)
            return tuple(tokenizer.encode(prompt))
    size = tokenizer.size
    wrong = next((id for id in prompt if not 0 <= id < size), None)
    if wrong is not None:
        raise ApiError(400, f"prompt: token id {str(wrong)[:20]}, expected 0 to {size - 1}", param="prompt")
    return tuple(prompt)


def encoded(text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """A text by any tokenizer."""
    return tokenizer.encode(text)


def requests_for(
    body: BaseRequest, prompt: tuple[int, ...], settings: ChoiceSettings, param: str, encode: Encode
) -> list[GenerationRequest]:
    """`n` requests for one prompt, which `encode` encodes by another tokenizer.

    Raises ApiError where it is empty or leaves no room for an answer.
    """
    if not prompt:
        raise ApiError(400, f"{param}: the prompt is empty", param=param)
    room = settings.context - len(prompt)
    if room < 1:
        message = (
            f"the context of this model is {settings.context} tokens; the prompt has {len(prompt)}, "
            "which leaves no room for an answer"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    max_tokens, model, tokenizer = min(settings.max_tokens, room), settings.model, settings.tokenizer
    shared = GenerationRequest(
        prompt,
        max_tokens,
        model.arm,
        top_logprobs=settings.top_logprobs,
        quality=model.quality,
        vocabulary=tokenizer.vocabulary,
        encode=encode,
    )
    return [replace(shared, sampling=sampling) for sampling in samplings(body, tokenizer.sampling)]


def samplings(body: BaseRequest, recommended: Sampling) -> list[Sampling]:
    """One for each of the `n` choices; what the request does not give is `recommended`."""
    seed = secrets.randbits(63) if body.seed is None else body.seed
    temperature = recommended.temperature if body.temperature is None else body.temperature
    top_p = recommended.top_p if body.top_p is None else max(body.top_p, MIN_TOP_P)
    return [Sampling(temperature, top_p, (seed + index) % (MAX_SEED + 1)) for index in range(body.n)]


@contextmanager
def naming(param: str) -> Iterator[None]:
    """The field at fault, in the error of a prompt that is too long. Raises ApiError."""
    try:
        yield
    except ContextExceeded as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="context_length_exceeded") from None


def build_job(
    kind: Kind,
    body: BaseRequest,
    settings: ChoiceSettings,
    requests: Sequence[GenerationRequest],
    echoed_prompts: Sequence[str],
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
    )
