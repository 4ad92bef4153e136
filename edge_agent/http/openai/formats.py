"""What a request says about the answer's text beforehand: its format, a prediction of it, and biases of its tokens."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from isthmus.edge_agent.http.openai.body import RequestModel, join_text_parts
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.tools import NAME
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES, Grammar

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIASES),
]


class JsonSchema(RequestModel):
    """`strict` is the case whatever it says."""

    name: NAME
    schema_: dict[str, Any] | bool = Field(True, alias="schema")
    strict: bool = False


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Prediction(RequestModel):
    """Text that the answer is expected to repeat in large part."""

    type: Literal["content"]
    content: Annotated[str, BeforeValidator(join_text_parts)]


def answer_grammar(format: ResponseFormat | None) -> Grammar | None:
    """Of an answer in this format; None: free text. Raises ApiError 400."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar("json_object")
    if format.json_schema is None:
        raise ApiError(400, "response_format.json_schema: Field required", param="response_format.json_schema")
    text = json.dumps(format.json_schema.schema_)
    if len(text) > MAX_GRAMMAR_BYTES:
        message = f"response_format.json_schema.schema: {len(text)} bytes, at most {MAX_GRAMMAR_BYTES}"
        raise ApiError(400, message, param="response_format.json_schema.schema")
    return Grammar("json_schema", text)


def token_biases(biases: dict[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """By token, in rising order. Raises ApiError 400 for ids outside of the vocabulary."""
    found = tuple(sorted((int(id), value) for id, value in biases.items() if value))
    if found and found[-1][0] >= tokenizer.size:
        message = f"logit_bias: token id {found[-1][0]}, expected 0 to {tokenizer.size - 1}"
        raise ApiError(400, message, param="logit_bias")
    return found
