"""Request bodies of the OpenAI API as pydantic models. Knows nothing about models, tokens or HTTP responses.

Supported fields are validated strictly. A field that would change the answer but is not supported is refused by name;
all others are ignored. null means absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.models.messages import MAX_SEED

MAX_N = 8  # choices for each prompt
MAX_MESSAGES = 10_000
MAX_STOPS = 4
MAX_STOP_CHARS = 1000  # text is held back while a stop string may have begun, and compared at every token
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NEUTRAL_VALUES: Mapping[
    str, tuple[object, ...]
] = {  # unsupported fields, and those of their values that change nothing
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


def join_text_parts(content: object) -> object:
    """The text of a message's content, which is a string or a list of text parts. Parts are joined with a line feed."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if is_text_part(part)]
    if len(texts) < len(content):
        raise ValueError('expected a string or a list of {"type": "text", "text": ...}; this model reads text only')
    return "\n".join(texts)


def is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def normalize_role(role: object) -> object:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"expected one of {', '.join(ROLES)}")
    return ROLES[role]


def as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def normalize_prompts(prompt: object) -> object:
    """A string, a list of strings, token ids or a list of lists of them, as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if is_id_list(prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt) or all(is_id_list(item) for item in prompt):
            return prompt
    raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists")


def is_id_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


class RequestModel(BaseModel):
    """Strict about known fields; ignores unknown ones and drops null."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: field for name, field in value.items() if field is not None}


class ChatMessage(RequestModel):
    """`content` null or missing is no text, which an assistant alone may have said."""

    role: Annotated[str, BeforeValidator(normalize_role)]
    content: Annotated[str | None, BeforeValidator(join_text_parts)] = Field(None, validate_default=True)
    tool_calls: list[object] = Field([], max_length=0)

    @field_validator("content")
    @classmethod
    def check_content(cls, content: str | None, info: ValidationInfo) -> str:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("expected a string or a list of text parts; only an assistant's may be null")
        return content or ""


class StreamOptions(RequestModel):
    include_usage: bool = False


class BaseRequest(RequestModel):
    """Fields of both endpoints. `private` and `quality` are ours."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(as_list),
    ] = []
    seed: int | None = Field(None, ge=-(1 << 63), le=MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    private: bool = False
    quality: float | None = Field(None, ge=0, le=1)


class ChatRequest(BaseRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(BaseRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(normalize_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int = Field(1, ge=1)


RequestT = TypeVar("RequestT", bound=BaseRequest)


def parse_request(kind: type[RequestT], data: bytes) -> RequestT:
    """Raises ApiError 400 with a message of one line that names the field."""
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    refuse_unsupported(body)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise describe(error) from None


def refuse_unsupported(body: Mapping[str, object]) -> None:
    """Raises ApiError 400 for a field that is not supported and would change the answer."""
    for name, neutral in NEUTRAL_VALUES.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")


def describe(error: ValidationError) -> ApiError:
    """The first of the errors, with the path of its field, such as messages[0].role."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(f"[{step}]" if isinstance(step, int) else step for step in first["loc"]).replace(".[", "[")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)
