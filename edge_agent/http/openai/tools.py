"""Tools of a request, which of them an answer may call, and the grammar of an answer that has to.

    tool_choice none       no tools at all
    tool_choice auto       the prompt holds them; the answer is free
    strict tools           the same, but a call that begins is held to the schema of its function
    required, or a name    the answer is one call, a JSON object by a grammar

Knows nothing about how a call is found in an answer (tool_calls.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from isthmus.edge_agent.http.openai.body import RequestModel
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.models.language.checkpoint.tool_format import CLOSE, OPEN, Tool
from isthmus.models.language.grammar import json_rule
from isthmus.models.messages import Grammar

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10  # of all definitions together: each is rendered, and may be compiled
MAX_DESCRIPTION = 16 << 10  # characters
NAME = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
STRICT = """\
start: (before "\\n" ({calls}) "\\n{close}")* AFTER
before[suffix="{open}"]: /(?s:.*)/
AFTER: /(?s:.*)/ & ~/(?s:.*{open}.*)/
{rules}
"""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(RequestModel):
    """`parameters`: a JSON schema of the arguments; none by default. One that is `strict` makes all so."""

    name: NAME
    description: str = Field("", max_length=MAX_DESCRIPTION)
    parameters: dict[str, Any] = NO_ARGUMENTS
    strict: bool = False


class ToolDefinition(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> Tool:
        """As chat templates read it."""
        function = self.function
        fields = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": fields}


class NamedFunction(RequestModel):
    name: NAME


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


def checked_choice(choice: object) -> object:
    """Raises ValueError in words that are easier than those of a union."""
    match choice:
        case "none" | "auto" | "required" | {"type": "function", "function": {"name": str()}}:
            return choice
    raise ValueError('expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(checked_choice)]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What an answer may call. `forced`: it is one call, and nothing else. `parallel`: it may hold several.

    `strict`: each call is what the schema of its function says.
    """

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    forced: bool = False
    parallel: bool = True
    strict: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name_of(tool) for tool in self.callable)


def tool_use(
    tools: Sequence[ToolDefinition], choice: Literal["none", "auto", "required"] | NamedTool | None, parallel: bool
) -> ToolUse | None:
    """None where nothing can be called. Raises ApiError 400 for too much, one name twice, and an unknown name."""
    if not tools:
        if isinstance(choice, NamedTool) or choice == "required":
            raise ApiError(400, "tool_choice: there are no tools to call", param="tool_choice")
        return None
    given = tuple(tool.for_template() for tool in tools)
    check_tools(given)
    if choice == "none":
        return None
    if not isinstance(choice, NamedTool):
        strict = any(tool.function.strict for tool in tools)
        return ToolUse(given, given, choice == "required", parallel, strict)
    named = tuple(tool for tool in given if name_of(tool) == choice.function.name)
    if not named:
        raise ApiError(400, f"tool_choice: there is no tool {choice.function.name}", param="tool_choice")
    return ToolUse(given, named, True, parallel)


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises ApiError 400."""
    size = sum(len(json.dumps(tool)) for tool in tools)
    if size > MAX_TOOLS_BYTES:
        raise ApiError(400, f"tools: {size} bytes of definitions, at most {MAX_TOOLS_BYTES}", param="tools")
    names = [name_of(tool) for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(400, f"tools: two have the name {twice}", param="tools")


def name_of(tool: Tool) -> str:
    name: str = tool["function"]["name"]
    return name


def call_grammar(tools: Sequence[Tool]) -> Grammar:
    """One call of one of `tools`, as a JSON object."""
    many = len(tools) > 1
    calls = [call_schema(tool, f"/anyOf/{index}" if many else "") for index, tool in enumerate(tools)]
    return Grammar("json_schema", json.dumps({"anyOf": calls} if many else calls[0]))


def strict_grammar(tools: Sequence[Tool]) -> Grammar:
    """Text, in which every `<tool_call>` is a call of one of `tools`."""
    rules = [f"call_{index}: {json_rule(call_schema(tool, ''))}" for index, tool in enumerate(tools)]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    text = STRICT.format(open=OPEN, close=CLOSE, calls=calls, rules="\n".join(rules))
    return Grammar("lark", text)


def call_schema(tool: Tool, place: str) -> dict[str, Any]:
    """The schema of a call of `tool`, for this place (a JSON pointer) in a larger one."""
    parameters = relocated(tool["function"]["parameters"], f"#{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": name_of(tool)}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def relocated(schema: Any, place: str) -> Any:
    """`schema` with its references to itself as they are at another place."""
    if isinstance(schema, list):
        return [relocated(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: relocated(each, place) for key, each in schema.items()}
    reference = schema.get("$ref")
    return {**moved, "$ref": place + reference[1:]} if isinstance(reference, str) and reference[:1] == "#" else moved
