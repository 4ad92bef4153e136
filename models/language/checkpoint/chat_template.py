"""Render a conversation as text with the model's own chat template.

Templates come with checkpoints and are Jinja programs. They run in Jinja's sandbox, which blocks access to Python's
attributes but does not limit their run time and memory, so a template is as trustworthy as its checkpoint. Opening one
runs no part of it. Knows nothing about tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.models.errors import BundleError, InvalidInput

MAX_TEMPLATE_CHARACTERS = 1 << 18  # the longest published templates have about 20,000


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

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the assistant's answer begins. Raises InvalidInput when the template raises an error."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self.variables)
        except Exception as error:  # a template is a program and can raise anything
            raise InvalidInput(f"the chat template rejects these messages: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says. A template can make it say anything."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:200])


def environment() -> ImmutableSandboxedEnvironment:
    """Configured as in transformers (`_cached_compile_jinja_template` in utils/chat_template_utils.py)."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # with `_unchanged`: opening a template evaluates no part of it
        finalize=_unchanged,
    )
    sandbox.filters["tojson"] = tojson
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
