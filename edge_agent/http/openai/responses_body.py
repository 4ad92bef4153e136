"""Bodies of POST /v1/responses: the basic use of OpenAI's client, as a chat. Nothing is stored.

input, instructions  -> messages        text.format -> response_format
max_output_tokens    -> max_completion_tokens       tools, tool_choice -> of a chat
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from isthmus.edge_agent.http.openai.body import json_object, refuse_unsupported
from isthmus.edge_agent.http.openai.chat_jobs import job_of_chat
from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import Job
from isthmus.edge_agent.http.openai.schema import MAX_MESSAGES, ChatRequest, validate
from isthmus.edge_agent.language.request import GenerationBackend

Json = dict[str, Any]
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {  # with values that change nothing
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
SAME = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "private", "quality", "seed", "stop")
INDEX = re.compile(r"^\[(\d+)\]")
NAMES = {  # of a chat's fields, in errors
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


def response_job(data: bytes, private: bool, backend: GenerationBackend) -> Job:
    """The job of a body of /v1/responses. Raises ApiError."""
    body = json_object(data)
    refuse_unsupported(body, UNSUPPORTED)
    chat = {name: body[name] for name in SAME if name in body}
    chat |= {"messages": messages_of(body), "tools": tools_of(body.get("tools")), "tool_choice": choice_of(body)}
    chat |= {"max_completion_tokens": body.get("max_output_tokens"), "response_format": format_of(body.get("text"))}
    try:
        request = validate(ChatRequest, chat)
        job = job_of_chat(request, private, backend)
    except ApiError as error:
        raise renamed(error, places_of(body)) from None
    echoed = {
        "instructions": body.get("instructions"),
        "max_output_tokens": request.max_completion_tokens,
        "metadata": {},
        "parallel_tool_calls": request.parallel_tool_calls,
        "temperature": job.requests[0].sampling.temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": job.requests[0].sampling.top_p,
    }
    return replace(job, echoed=echoed, grammar_field=job.grammar_field.replace("response_format", "text.format"))


def renamed(error: ApiError, places: Sequence[int]) -> ApiError:
    """The error of a chat with the names of a response's fields; `places`: see `places_of`."""
    param, message = error.error["param"] or "", error.error["message"] or ""
    name = next((name for name in NAMES if param.startswith(name)), "")
    if name:
        ours = NAMES[name] + INDEX.sub(lambda found: f"[{places[int(found[1])]}]", param[len(name) :], count=1)
        message = message.replace(param, ours, 1)
        error.error |= {"param": ours, "message": message}
    return error


def messages_of(body: Mapping[str, Any]) -> list[Json]:
    """Instructions and input as messages. Raises ApiError."""
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_MESSAGES:
        raise wrong("input", f"expected a string or a list of 1 to {MAX_MESSAGES} items")
    instructions = body.get("instructions")
    if not isinstance(instructions, str | None):
        raise wrong("instructions", "expected a string")
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(items):
        message = message_of(item, f"input[{index}]")
        if follows_call(items, index):
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return messages


def follows_call(items: Sequence[Json], index: int) -> bool:
    """Whether it is a function call after another one, and so of the same message."""
    return index > 0 and all(item.get("type") == "function_call" for item in items[index - 1 : index + 1])


def places_of(body: Mapping[str, Any]) -> list[int]:
    """For each message of `messages_of` the index of the item of the input that it begins with; of instructions -1."""
    items = body["input"] if isinstance(body["input"], list) else [{}]
    begins = [index for index in range(len(items)) if not follows_call(items, index)]
    return [-1, *begins] if body.get("instructions") else begins


def message_of(item: object, place: str) -> Json:
    """One item of the input. Raises ApiError."""
    if not isinstance(item, dict):
        raise wrong(place, "expected an object")
    kind = item.get("type") or "message"
    convert = CONVERTED.get(kind) if isinstance(kind, str) else None
    if convert is None:
        raise wrong(f"{place}.type", f"expected one of {', '.join(CONVERTED)}")
    return convert(item)


def call_message(item: Json) -> Json:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


CONVERTED: Mapping[str, Callable[[Json], Json]] = {
    "message": lambda item: {"role": item.get("role"), "content": item.get("content")},
    "function_call": call_message,
    "function_call_output": lambda item: {
        "role": "tool",
        "content": item.get("output"),
        "tool_call_id": item.get("call_id"),
    },
}


def tools_of(tools: object) -> object:
    """Tools of a chat: the fields of a function are within an object of their own. Raises ApiError."""
    if not isinstance(tools, list):
        return tools
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{index}].type", 'expected "function"')
    return [{"type": "function", "function": {**tool, "type": None}} for tool in tools]


def choice_of(body: Mapping[str, Any]) -> object:
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def format_of(text: object) -> object:
    """`text.format` as a response_format. Raises ApiError."""
    if not isinstance(text, dict | None):
        raise wrong("text", "expected an object")
    found = (text or {}).get("format")
    if isinstance(found, dict) and found.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {**found, "type": None}}
    return found


def wrong(place: str, expected: str) -> ApiError:
    return ApiError(400, f"{place}: {expected}", param=place)
