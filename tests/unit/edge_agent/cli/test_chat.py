from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from isthmus.edge_agent.cli.chat import BIDIRECTIONAL, Chat, ChatSettings, chat, status, visible
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import LinkDown
from tests.unit.edge_agent.language.scripted import Scripted

GREEN, CYAN, MAGENTA = "\x1b[32m", "\x1b[36m", "\x1b[35m"


def console(terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=200
    )


def said(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def talk(generator: Scripted, *lines: str, arm: Arm = "verify", terminal: bool = False, **settings: Any) -> str:
    out = console(terminal)
    chat(generator, arm, out, ChatSettings(**settings), io.StringIO("\n".join(lines)))
    return said(out)


def objects(generator: Scripted, *lines: str) -> list[Any]:
    return [json.loads(line) for line in talk(generator, *lines, as_json=True).splitlines()]


def test_plain_lines_get_plain_answers() -> None:
    out = talk(Scripted("Grüße,\tyou \nand you"), "hi", "")
    assert out.startswith("Grüße,")
    assert "you \nand you\n" in out
    assert "\x1b" not in out
    assert "B up" in out


def test_every_token_has_the_colour_of_where_it_was_made() -> None:
    out = talk(Scripted("abc", sources=("edge", "draft", "cloud")), "hi", terminal=True)
    assert f"{GREEN}a\x1b[0m{CYAN}b\x1b[0m{MAGENTA}c\x1b[0m" in out


def test_figures_of_an_answer() -> None:
    (answer,) = objects(Scripted("abcd", sources=("edge", "draft", "cloud", "cloud")), "hi")
    assert answer["question"] == "hi"
    assert answer["text"] == "abcd"
    assert answer["made"] == {"edge": 1, "draft": 1, "cloud": 2}
    assert (answer["tokens"], answer["device_share"], answer["finish"]) == (4, 0.5, "stop")
    assert (answer["bytes_up"], answer["bytes_down"], answer["rtt_ms"]) == (40, 50, 25.0)
    assert answer["usd"] > 0
    assert answer["tokens_per_s"] > 0
    assert answer["first_token_ms"] >= 0


def test_times_are_the_clocks() -> None:
    out = console()
    ticks = count()
    Chat(Scripted("ab"), "edge", out, ChatSettings(), clock=lambda: float(next(ticks))).answer("hi")
    assert "2 tokens · 0.4/s · first after 1000 ms · 100% made on the device" in said(out)


def test_the_conversation_goes_on_until_it_is_reset() -> None:
    generator = Scripted("A")
    talk(generator, "one", "two", "/reset", "three", system="S")
    assert [bytes(ask.prompt) for ask in generator.asks] == [
        b"[system]S[user]one[assistant]",
        b"[system]S[user]one[assistant]A[user]two[assistant]",
        b"[system]S[user]three[assistant]",
    ]


def test_commands() -> None:
    generator = Scripted("A")
    out = talk(generator, "/help", "/arm edge", "q", "/arm moon", "/nothing", "/quit", "not asked")
    assert [ask.arm for ask in generator.asks] == ["edge"]
    assert "/reset" in out
    assert "'moon' is not available; there is auto, edge, cloud, verify, now edge" in out
    assert "unknown command /nothing" in out


def test_the_oldest_is_forgotten_when_the_context_is_full() -> None:
    generator = Scripted("A", context=120)
    out = talk(generator, "x" * 60, "y" * 20, "z" * 20)
    assert "forgotten" in out
    assert bytes(generator.asks[2].prompt) == b"[user]" + b"y" * 20 + b"[assistant]A[user]" + b"z" * 20 + b"[assistant]"


def test_a_question_that_is_too_long_is_an_error_and_not_remembered() -> None:
    generator = Scripted("A", context=100)
    out = talk(generator, "x" * 200, "hi")
    assert "error: 217 tokens are too many for a context of 100" in out
    assert bytes(generator.asks[0].prompt) == b"[user]hi[assistant]"


def test_failures_are_told_and_counted_and_the_chat_goes_on() -> None:
    out = console()
    generator = Scripted("ab", error=LinkDown("the \x1b[31mcloud is gone"))
    assert chat(generator, "cloud", out, ChatSettings(), io.StringIO("one\ntwo")) == 2
    assert said(out).count("error: the \\x1b[31mcloud is gone") == 2
    assert bytes(generator.asks[1].prompt) == b"[user]two[assistant]"
    assert objects(generator, "one") == [{"error": "the \x1b[31mcloud is gone"}]


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    generator = Scripted("ab", error=KeyboardInterrupt())  # type: ignore[arg-type]
    out = talk(generator, "one", "two")
    assert "interrupted" in out
    assert generator.closed.is_set()
    assert b"[assistant]ab[user]two" in bytes(generator.asks[1].prompt)
    (answer, *_) = objects(generator, "one")
    assert (answer["finish"], answer["bytes_up"], answer["text"]) == ("interrupted", None, "ab")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc é 👩‍🚀", "a\tb\nc é 👩‍🚀"),
        ("\x1b[2J\x07\r\x00\x7f", "\\x1b[2J\\x07\\x0d\\x00\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("safe\u202etxt", "safe\\u202etxt"),
    ],
)
def test_control_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_every_control_character_is_made_visible() -> None:
    control = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) + BIDIRECTIONAL
    assert not set(visible(control)) & set(control)


def test_a_model_can_neither_paint_nor_steer_the_terminal() -> None:
    out = talk(Scripted("[bold]\x1b]0;title\x07[/bold] :smile: [red]\x1b[2J"), "hi")
    assert "[bold]\\x1b]0;title\\x07[/bold] :smile: [red]\\x1b[2J" in out


def test_a_person_sees_the_legend_once_and_leaves_with_the_end_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Iterator[str | BaseException] = iter(["hi", KeyboardInterrupt(), "again", EOFError()])

    def line(*_: object) -> str:
        said_now = next(lines)
        if isinstance(said_now, str):
            return said_now
        raise said_now

    out = console()
    monkeypatch.setattr(out, "input", line)
    generator = Scripted("A")
    assert chat(generator, "edge", out) == 0
    assert said(out).count("device, confirmed by the cloud") == 1
    assert len(generator.asks) == 2


def test_a_degraded_answer_says_why() -> None:
    figures: dict[str, object] = dict.fromkeys(
        ("tokens_per_s", "first_token_ms", "device_share", "bytes_up", "bytes_down", "rtt_ms", "usd", "arm")
    )
    line = status({**figures, "tokens": 3, "finish": "length", "degraded": True, "why": "the cloud \x1bwas lost"})
    assert line == "3 tokens · DEGRADED: the cloud \\x1bwas lost"
    told = status({**figures, "tokens": 3, "finish": "length", "degraded": False, "arm": "auto", "why": "fastest"})
    assert told == "3 tokens · auto · fastest"


def test_max_tokens_and_sampling_reach_the_prompt_loop() -> None:
    generator = Scripted("A")
    talk(generator, "hi", max_tokens=5)
    talk(generator, "hi", max_tokens=500)
    talk(generator, "hi")
    assert [ask.max_tokens for ask in generator.asks] == [5, 200 - 19, 200 - 19]
