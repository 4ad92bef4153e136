"""Render a conversation as text with the model's own chat template.

Templates come with checkpoints, or from a service, and are Jinja programs. They run in Jinja's sandbox, which blocks
access to Python's attributes. Here loops and calls are limited in run time, repetitions and the text in size; filters
can still take much memory, so do not use a service that you do not trust. Opening a template runs no part of it. Knows
nothing about tokens.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.tool_format import Message, Tool, native_messages, text_messages

MAX_TEMPLATE_CHARACTERS = 1 << 18  # the longest published templates have about 20,000
MAX_TEXT_CHARACTERS = 1 << 26  # of a conversation
MAX_REPEATED = 1 << 20  # characters or elements of a repetition
MAX_NUMBER = 1 << 64  # of a product
TOOLS = re.compile(r"\btools\b")  # in a template's source: Hermes, Qwen, Llama 3 and Mistral render them
RENDER_S = 2.0  # of computing: a conversation takes milliseconds


class ChatTemplate:
    """A compiled template. `variables` are special tokens such as bos_token and eos_token, by name."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Raises BundleError when `source` is not a template."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise BundleError(f"chat template: {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS}")
        try:
            "".join([source, *variables.values()]).encode()
            self._template = environment().from_string(source)
        except Exception as error:  # of Python's compiler too, which Jinja's output can be too deep for
            raise BundleError(f"chat template: {one_line(error)}") from error
        self.source, self.variables = source, dict(variables)

    @property
    def knows_tools(self) -> bool:
        """Whether the template reads tools, and so calls and results of them."""
        return TOOLS.search(self.source) is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text up to where the assistant's answer begins. Raises InvalidInput when the template raises an error."""
        variables: dict[str, object] = {"add_generation_prompt": True, **self.variables}
        if self.knows_tools:
            turns, variables = native_messages(messages), {**variables, **({"tools": list(tools)} if tools else {})}
        else:
            turns = text_messages(messages, tools)
        try:
            _render.until_s = time.thread_time() + RENDER_S
            parts, size = list[str](), 0
            for part in self._template.generate(messages=turns, **variables):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT_CHARACTERS:
                    raise jinja2.TemplateError(f"more than {MAX_TEXT_CHARACTERS} characters")
            return "".join(parts)
        except Exception as error:  # a template is a program and can raise anything
            raise InvalidInput(f"the chat template rejects these messages: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says. A template can make it say anything."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:200])


_render = threading.local()  # `until_s`: CPU time of this thread at which its rendering ends


class _Sandbox(ImmutableSandboxedEnvironment):
    """Looks at the clock with every step of a loop and every call, and limits repetitions."""

    intercepted_binops = frozenset(("*", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "in_time", [], [], None, None, lineno=loop.lineno)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_time()
        if isinstance(__obj, LoopContext) and args:  # a recursive loop
            args = (in_time(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(each) if isinstance(each, Sized) else abs(each) for each in (left, right)]
        numbers = not any(isinstance(each, Sized) for each in (left, right))
        if max(sizes) > 64 if operator == "**" else sizes[0] * sizes[1] > (MAX_NUMBER if numbers else MAX_REPEATED):
            raise jinja2.TemplateError(f"too large a result of {operator}")
        return super().call_binop(context, operator, left, right)


def check_time() -> None:
    """Raises TemplateError once rendering has taken too long."""
    if time.thread_time() > _render.until_s:
        raise jinja2.TemplateError(f"not done after {RENDER_S:.0f} s")


def in_time(items: Iterable[Any]) -> Iterator[Any]:
    """The items, while there is time."""
    for item in items:
        check_time()
        yield item


def environment() -> ImmutableSandboxedEnvironment:
    """Configured as in transformers (`_cached_compile_jinja_template` in utils/chat_template_utils.py)."""
    sandbox = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # with `_unchanged`: opening a template evaluates no part of it
        finalize=_unchanged,
    )
    sandbox.filters["tojson"] = tojson
    sandbox.filters["in_time"] = in_time
    del sandbox.globals["lipsum"]
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = strftime_now
    return sandbox


@jinja2.pass_context
def _unchanged(_context: Context, value: object) -> object:
    """Of every output. It asks for the context, without which Jinja cannot compute constants when it compiles."""
    return value


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The current local time."""
    return datetime.now().strftime(pattern)
