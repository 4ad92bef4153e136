"""Request bodies of the OpenAI API as pydantic models. Knows nothing about models, tokens or HTTP responses.

Supported fields are validated strictly. A field that would change the answer but is not supported is refused by name;
all others are ignored. null means absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import from_json

from isthmus.edge_agent.http.openai.body import (
    RequestModel,
    describe,
    join_text_parts,
    json_object,
    refuse_unsupported,
)
from isthmus.edge_agent.http.openai.formats import LogitBias, Prediction, ResponseFormat
from isthmus.edge_agent.http.openai.tools import MAX_TOOLS, NAME, ToolChoice, ToolDefinition
from isthmus.models.language.checkpoint.tool_format import ToolCall
from isthmus.models.messages import MAX_SEED

MAX_N = 8  # choices for each prompt
MAX_MESSAGES = 10_000
MAX_STOPS = 4
MAX_STOP_CHARS = 1000  # text is held back while a stop string may have begun, and compared at every token
MAX_CALLS = 128  # of a message
MAX_ID = 256  # characters of a call's id
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {  # unsupported fields, with values that change nothing
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
    "web_search_options": (),
}


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


class CalledFunction(RequestModel):
    name: NAME
    arguments: str

    @field_validator("arguments")
    @classmethod
    def check_arguments(cls, arguments: str) -> str:
        try:
            parsed = from_json(arguments, allow_inf_nan=False)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError("expected a JSON object as text")
        return arguments


class CallMessage(RequestModel):
    id: str = Field(max_length=MAX_ID)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    """`content` null or missing is no text, which an assistant alone may have said."""

    role: Annotated[str, BeforeValidator(normalize_role)]
    content: Annotated[str | None, BeforeValidator(join_text_parts)] = Field(None, validate_default=True)
    tool_calls: list[CallMessage] = Field([], max_length=MAX_CALLS)
    tool_call_id: str = Field("", max_length=MAX_ID)

    @field_validator("content")
    @classmethod
    def check_content(cls, content: str | None, info: ValidationInfo) -> str:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("expected a string or a list of text parts; only an assistant's may be null")
        return content or ""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Those of an assistant."""
        return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls)


class StreamOptions(RequestModel):
    include_usage: bool = False


class BaseRequest(RequestModel):
    """Fields of both endpoints. `private` and `quality` are ours. `neutral_values`: of fields of the other endpoint."""

    neutral_values: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(as_list),
    ] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(1 << 63), le=MAX_SEED)
    logit_bias: LogitBias = Field(default_factory=dict)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    private: bool = False
    quality: float | None = Field(None, ge=0, le=1)


class ChatRequest(BaseRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[ToolDefinition] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None


class CompletionRequest(BaseRequest):
    """Body of POST /v1/completions."""

    neutral_values: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "prediction": (),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }
    max_tokens: int | None = Field(None, ge=0)
    prompt: Annotated[list[Any], BeforeValidator(normalize_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int = Field(1, ge=1)


RequestT = TypeVar("RequestT", bound=BaseRequest)


def parse_request(kind: type[RequestT], data: bytes) -> RequestT:
    """Raises ApiError 400 with a message of one line that names the field."""
    return validate(kind, json_object(data))


def validate(kind: type[RequestT], body: Mapping[str, object]) -> RequestT:
    """Raises ApiError 400 with a message of one line that names the field."""
    refuse_unsupported(body, {**NEUTRAL_VALUES, **kind.neutral_values})
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise describe(error) from None
