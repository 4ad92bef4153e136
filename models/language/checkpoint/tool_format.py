"""A conversation with tools, as a chat template takes it.

    template that reads `tools`     the tools as its variable, calls as `tool_calls`, results with the role tool
    any other                       all of it as text: tools after the system message, calls and results within tags

The text is the format of Hermes, which Qwen's templates write too:

    <tool_call>
    {"name": "add", "arguments": {"a": 1}}
    </tool_call>

Knows nothing about tokens, or about how a model's answer is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTIONS = """\
You can call functions. Their signatures are within <tools></tools>, a JSON object on each line:
<tools>
{tools}
</tools>
To call a function, write a JSON object with its name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """An assistant's call. `arguments`: a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is usually system, user, assistant or tool.

    `calls`: of an assistant. `call_id`, `name`: of the call whose result a tool's message is.
    """

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""


Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


def native_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """For a template that reads `tools`."""
    return [native_message(message) for message in messages]


def native_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.calls
        ]
    if message.role == "tool":
        fields |= {"tool_call_id": message.call_id, "name": message.name}
    return fields


def text_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """For a template that reads roles and content alone."""
    turns = [{"role": "user" if each.role == "tool" else each.role, "content": text_of(each)} for each in messages]
    if not tools:
        return turns
    text = INSTRUCTIONS.format(tools="\n".join(to_json(tool) for tool in tools))
    if turns and turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def text_of(message: Message) -> str:
    """A turn as text, its calls or its result within tags."""
    if message.role == "tool":
        return f"<tool_response>\n{message.content}\n</tool_response>"
    calls = [f"{OPEN}\n{call_text(call)}\n{CLOSE}" for call in message.calls]
    return "\n".join([message.content, *calls] if message.content or not calls else calls)


def call_text(call: ToolCall) -> str:
    return to_json({"name": call.name, "arguments": json.loads(call.arguments)})


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
