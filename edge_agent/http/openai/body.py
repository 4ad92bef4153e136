"""What the models of request bodies share: strict fields, null as absent, text parts, errors that name a field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import from_json

from isthmus.edge_agent.http.openai.errors import ApiError

FIELD = re.compile(r"[a-z_0-9]{1,40}")  # of a path to a field: neither members of unions nor other people's keys


class RequestModel(BaseModel):
    """Strict about known fields; ignores unknown ones and drops null."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: field for name, field in value.items() if field is not None}


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a body is. Raises ApiError 400."""
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def refuse_unsupported(body: Mapping[str, object], neutral_values: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ApiError 400 for a field that is not supported and would change the answer."""
    for name, neutral in neutral_values.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")


def describe(error: ValidationError) -> ApiError:
    """The first of the errors, with the path of its field, such as messages[0].role."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    steps = [step for step in first["loc"] if isinstance(step, int) or FIELD.fullmatch(step)]
    param = ".".join(f"[{step}]" if isinstance(step, int) else step for step in steps).replace(".[", "[")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


def join_text_parts(content: object) -> object:
    """The text of a message's content, which is a string or a list of text parts. Parts are joined with a line feed."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if is_text_part(part)]
    if len(texts) < len(content):
        raise ValueError('expected a string or a list of {"type": "text", "text": ...}; this model reads text only')
    return "\n".join(texts)


def is_text_part(part: object) -> bool:
    """Of a chat, and of a response's input and output."""
    kinds = ("text", "input_text", "output_text")
    return isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
