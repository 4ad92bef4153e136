"""Chat templates: what transformers' environment offers, and what the sandbox refuses."""

from __future__ import annotations

from datetime import datetime

import pytest

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint import chat_template
from isthmus.models.language.checkpoint.chat_template import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from isthmus.models.language.checkpoint.tool_format import Message


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render([Message("user", "<é>")])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "<é>"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ bos_token }}{{ tools }}{{ eos_token }}", "<s>"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}", "2"),
    ],
)
def test_templates(source: str, text: str) -> None:
    assert render(source) == text


def test_template_knows_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_that_refuse(source: str) -> None:
    with pytest.raises(InvalidInput, match="the chat template rejects"):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | nothing }}", "x" * (MAX_TEMPLATE_CHARACTERS + 1)])
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(BundleError, match="chat template"):
        render(source)


def test_what_a_template_says_is_one_line() -> None:
    template = ChatTemplate("{{ raise_exception('\n\x1b[2J no') }}", {})
    with pytest.raises(InvalidInput, match=r"rejects these messages:   \[2J no$"):
        template.render([])


NESTED = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
BRANCHING = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}"
RECURSIVE = "{% for i in [1] recursive %}{{ loop(range(100000)) if loop.depth < 60 }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (NESTED, "not done after"),
        (BRANCHING, "not done after"),
        (RECURSIVE, "not done after"),
        ("{{ 'x' * 10000000000 }}", "too large a result of *"),
        ("{{ 10000000000 * [1, 2] }}", "too large a result of *"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "too large a result of **"),
        ("{% for i in range(1000) %}{{ 'x' * 1000000 }}{% endfor %}", "characters"),
        ("{{ lipsum(n=1000000000) }}", "undefined"),
    ],
)
def test_a_template_that_does_not_end_or_grows_is_given_up(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.05)
    monkeypatch.setattr(chat_template, "MAX_TEXT_CHARACTERS", 1 << 22)
    with pytest.raises(InvalidInput) as caught:
        render(source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_limited_works_as_in_jinja() -> None:
    assert render("{{ '=' * 3 }}{{ 3 * [1] }}{{ 2 ** 10 }}{{ 1.5 * 2 }}") == "===[1, 1, 1]10243.0"
    assert render("{% for i in 'abc' %}{{ loop.length }}{{ i }}{{ ',' if not loop.last }}{% endfor %}") == "3a,3b,3c"
    assert render("{% for i in {'a': 1} %}{{ i }}{% else %}none{% endfor %}") == "a"
    assert render("{% for i in nothing %}{% else %}none{% endfor %}") == "none"
    tree = "{% for i in [[1, [2]], 3] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}"
    assert render(tree) == "123"
