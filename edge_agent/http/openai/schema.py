"""Requests of the OpenAI API: from the bytes of a body to a Job that the prompt loop can be asked.

What we honour is checked strictly; fields that ask for something we cannot do are refused by name; every other field
is ignored. null means absent. Knows nothing of HTTP beyond status codes; openai_replies.py words the answers.

Choices of ours, where the API leaves one: `seed` is taken modulo 2^63, and the n-th of several answers uses seed + n,
as they would be equal otherwise; `max_tokens` beyond the context means what is left of it; text parts are joined with a
line feed; `private` (or the header X-Isthmus-Private) keeps a request on the device; `quality`, or auto-q0.9 as the
model's name, is the share of an answer's tokens that are to be what the cloud's model would choose.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from isthmus.edge_agent.language.request import GenerationRequest, Generator
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.checkpoint.tokenizer import Message
from isthmus.models.messages import MAX_SEED, Sampling

MAX_ANSWERS = 8  # `n`
MAX_CHOICES = 128  # answers to one request, over all its prompts: they are made one after the other
MAX_STOPS = 4
MAX_STOP_CHARS = 1000  # an answer is held back while a stop string may have begun, and compared at every token
COMPLETION_TOKENS = 16  # default of /v1/completions
LEAST_TOP_P = 1e-9  # for 0, which OpenAI allows: the likeliest token alone
DIALLED = re.compile(r"(.+)-q(0(?:\.[0-9]{1,6})?|1(?:\.0{1,6})?)")  # auto-q0.9
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ASKS_NOTHING: Mapping[str, tuple[object, ...]] = {  # values of fields we cannot honour that we need not honour
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


class ApiError(Exception):
    """A request refused or failed, in OpenAI's words. `type` and `code` are theirs where they have one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": type, "param": param, "code": code}


def text_of(content: object) -> object:
    """A message's content: a string, or a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if is_text(part)]
    if len(texts) < len(content):
        raise ValueError('expected a string or a list of {"type": "text", "text": ...}; this model reads text only')
    return "\n".join(texts)


def is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def role_of(role: object) -> object:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"expected one of {', '.join(ROLES)}")
    return ROLES[role]


def stops_of(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def prompts_of(prompt: object) -> object:
    """A string, strings, token ids or lists of them -> a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if are_ids(prompt):
            return [prompt]
        if all(isinstance(one, str) for one in prompt) or all(are_ids(one) for one in prompt):
            return prompt
    raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists")


def are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


class Lenient(BaseModel):
    """Strict in what is known, silent on what is not. Without null: it means absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, value: object) -> object:
        return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


class ChatMessage(Lenient):
    role: Annotated[str, BeforeValidator(role_of)]
    content: Annotated[str, BeforeValidator(text_of)]
    tool_calls: list[object] = Field([], max_length=0)


class StreamOptions(Lenient):
    include_usage: bool = False


class Request(Lenient):
    """What both calls share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(stops_of),
    ] = []
    seed: int | None = Field(None, ge=-(1 << 63), le=MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    private: bool = False
    quality: float | None = Field(None, ge=0, le=1)


class ChatRequest(Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(Request):
    prompt: Annotated[list[Any], BeforeValidator(prompts_of)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int = Field(1, ge=1)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. `n` asks for each prompt, prompt after prompt; `echoes`: text before each answer."""

    kind: Literal["chat", "completion"]
    model: str
    arm: Arm
    asks: tuple[GenerationRequest, ...]
    n: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echoes: tuple[str, ...]


def chat_job(data: bytes, private: bool, generator: Generator) -> Job:
    """Raises ApiError."""
    request = checked(ChatRequest, data)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    arm, quality = arm_of(request, private or request.private, generator)
    prompt = generator.tokenizer.chat([Message(message.role, message.content) for message in request.messages])
    wanted = request.max_completion_tokens or request.max_tokens or generator.context
    top = (request.top_logprobs or 0) if request.logprobs else None
    asks = asks_of(request, tuple(prompt), wanted, arm, quality, top, generator.context, "messages")
    return job_of("chat", request, generator, arm, asks, ("",) * len(asks))


def completion_job(data: bytes, private: bool, generator: Generator) -> Job:
    """Raises ApiError."""
    request = checked(CompletionRequest, data)
    if request.best_of > request.n:
        raise ApiError(400, f"best_of is {request.best_of}, expected at most n ({request.n})", param="best_of")
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "echo cannot be had together with logprobs", param="echo")
    if len(request.prompt) * request.n > MAX_CHOICES:
        raise ApiError(400, f"{len(request.prompt)} prompts: over {MAX_CHOICES} answers at once", param="prompt")
    arm, quality = arm_of(request, private or request.private, generator)
    wanted = request.max_tokens or COMPLETION_TOKENS
    asks: list[GenerationRequest] = []
    echoes: list[str] = []
    for prompt in request.prompt:
        ids = ids_of(prompt, generator)
        asks += asks_of(request, ids, wanted, arm, quality, request.logprobs, generator.context, "prompt")
        text = prompt if isinstance(prompt, str) else generator.tokenizer.decode(ids)
        echoes += [text if request.echo else ""] * request.n
    return job_of("completion", request, generator, arm, asks, echoes)


Known = TypeVar("Known", bound=Request)
Check = Callable[[bytes, bool, Generator], Job]


def checked(kind: type[Known], data: bytes) -> Known:
    """Raises ApiError 400, one line, naming the field."""
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, accepted in ASKS_NOTHING.items():
        if body.get(name) is not None and body[name] not in accepted:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(f"[{step}]" if isinstance(step, int) else step for step in first["loc"]).replace(".[", "[")
        message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
        raise ApiError(400, message, param=param) from None


def arm_of(request: Request, private: bool, generator: Generator) -> tuple[Arm, float | None]:
    """The arm a model name asks for, and the quality. Raises ApiError 404, and 400 where privacy forbids it."""
    model, quality = request.model, request.quality
    if private and model.removeprefix(f"{generator.name}:") in ("cloud", "verify", "handoff"):
        raise ApiError(400, f"{model} would leave the device, and the request is private", param="model")
    known = models(generator)
    if dialled := DIALLED.fullmatch(model):
        model, quality = dialled[1], float(dialled[2])
    if model not in known or (dialled and known[model] != "auto"):
        raise unknown_model(request.model, known)
    return "edge" if private else known[model], quality


def unknown_model(model: str, known: Iterable[str]) -> ApiError:
    message = f"the model {model[:100]!r} does not exist or is not available now; there are {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def models(generator: Generator) -> dict[str, Arm]:
    """Names of models, and the arm each means now."""
    short: dict[str, Arm] = {arm: arm for arm in generator.arms()}
    return {generator.name: "auto", **short, **{f"{generator.name}:{name}": arm for name, arm in short.items()}}


def ids_of(prompt: str | Sequence[int], generator: Generator) -> tuple[int, ...]:
    """Raises ApiError for an id that is none."""
    if isinstance(prompt, str):
        return tuple(generator.tokenizer.encode(prompt))
    size = generator.tokenizer.size
    wrong = next((id for id in prompt if not 0 <= id < size), None)
    if wrong is not None:
        raise ApiError(400, f"prompt: token id {str(wrong)[:20]}, expected 0 to {size - 1}", param="prompt")
    return tuple(prompt)


def asks_of(
    request: Request,
    prompt: tuple[int, ...],
    wanted: int,
    arm: Arm,
    quality: float | None,
    top: int | None,
    context: int,
    param: str,
) -> list[GenerationRequest]:
    """`n` asks for one prompt. Raises ApiError where it is empty or leaves no room for an answer."""
    if not prompt:
        raise ApiError(400, f"{param}: the prompt is empty", param=param)
    if len(prompt) >= context:
        message = f"this model's context is {context} tokens; the prompt has {len(prompt)} and leaves none to answer"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    top_p = max(request.top_p, LEAST_TOP_P)
    room = min(wanted, context - len(prompt))
    samplings = [Sampling(request.temperature, top_p, (seed + index) % (MAX_SEED + 1)) for index in range(request.n)]
    return [GenerationRequest(prompt, room, arm, sampling, top, quality) for sampling in samplings]


def job_of(
    kind: Literal["chat", "completion"],
    request: Request,
    generator: Generator,
    arm: Arm,
    asks: Sequence[GenerationRequest],
    echoes: Sequence[str],
) -> Job:
    return Job(
        kind=kind,
        model=f"{generator.name}:{arm}",
        arm=arm,
        asks=tuple(asks),
        n=request.n,
        stops=tuple(request.stop),
        stream=request.stream,
        include_usage=request.stream_options.include_usage,
        echoes=tuple(echoes),
    )
