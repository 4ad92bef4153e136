"""Chat templates: what transformers' environment offers, and what the sandbox refuses."""

from __future__ import annotations

from datetime import datetime

import pytest

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.chat_template import MAX_TEMPLATE_CHARACTERS, ChatTemplate


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "<é>"}])


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
