from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from isthmus.edge_agent.cli.chat import ChatSession, ChatSettings, chat
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import LinkDown
from tests.unit.edge_agent.language.scripted import ScriptedBackend

GREEN, CYAN, MAGENTA = "\x1b[32m", "\x1b[36m", "\x1b[35m"


def console(terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=200
    )


def output(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def run_chat(
    backend: ScriptedBackend, *lines: str, arm: Arm = "verify", terminal: bool = False, **settings: Any
) -> str:
    out = console(terminal)
    chat(backend, arm, out, ChatSettings(**settings), io.StringIO("\n".join(lines)))
    return output(out)


def objects(backend: ScriptedBackend, *lines: str) -> list[Any]:
    return [json.loads(line) for line in run_chat(backend, *lines, as_json=True).splitlines()]


def test_lines_of_input_are_answered_in_plain_text() -> None:
    out = run_chat(ScriptedBackend("Grüße,\tyou \nand you"), "hi", "")
    assert out.startswith("Grüße,")
    assert "you \nand you\n" in out
    assert "\x1b" not in out
    assert "B up" in out


def test_every_token_has_the_colour_of_its_source() -> None:
    out = run_chat(ScriptedBackend("abc", sources=("edge", "draft", "cloud")), "hi", terminal=True)
    assert f"{GREEN}a\x1b[0m{CYAN}b\x1b[0m{MAGENTA}c\x1b[0m" in out


def test_statistics_of_an_answer() -> None:
    (answer,) = objects(ScriptedBackend("abcd", sources=("edge", "draft", "cloud", "cloud")), "hi")
    assert answer["question"] == "hi"
    assert answer["text"] == "abcd"
    assert answer["made"] == {"edge": 1, "draft": 1, "cloud": 2}
    assert (answer["tokens"], answer["device_share"], answer["finish"]) == (4, 0.5, "stop")
    assert (answer["bytes_up"], answer["bytes_down"], answer["rtt_ms"]) == (40, 50, 25.0)
    assert answer["usd"] > 0
    assert answer["tokens_per_s"] > 0
    assert answer["first_token_ms"] >= 0


def test_times_are_read_from_the_clock() -> None:
    out = console()
    ticks = count()
    ChatSession(ScriptedBackend("ab"), "edge", out, ChatSettings(), clock=lambda: float(next(ticks))).answer("hi")
    assert "2 tokens · 0.4/s · first after 1000 ms · 100% made on the device" in output(out)


def test_the_conversation_goes_on_until_it_is_reset() -> None:
    backend = ScriptedBackend("A")
    run_chat(backend, "one", "two", "/reset", "three", system="S")
    assert [bytes(request.prompt) for request in backend.requests] == [
        b"[system]S[user]one[assistant]",
        b"[system]S[user]one[assistant]A[user]two[assistant]",
        b"[system]S[user]three[assistant]",
    ]


def test_commands() -> None:
    backend = ScriptedBackend("A")
    out = run_chat(backend, "/help", "/arm edge", "q", "/arm moon", "/nothing", "/quit", "not asked")
    assert [request.arm for request in backend.requests] == ["edge"]
    assert "/reset" in out
    assert "arm 'moon' is not available; available are auto, edge, cloud, verify; now edge" in out
    assert "unknown command /nothing" in out


def test_the_oldest_messages_are_dropped_when_the_context_is_full() -> None:
    backend = ScriptedBackend("A", context=120)
    out = run_chat(backend, "x" * 60, "y" * 20, "z" * 20)
    assert "were dropped" in out
    assert (
        bytes(backend.requests[2].prompt) == b"[user]" + b"y" * 20 + b"[assistant]A[user]" + b"z" * 20 + b"[assistant]"
    )


def test_a_question_that_is_too_long_is_an_error_and_not_remembered() -> None:
    backend = ScriptedBackend("A", context=100)
    out = run_chat(backend, "x" * 200, "hi")
    assert "error: 217 tokens are too many for a context of 100" in out
    assert bytes(backend.requests[0].prompt) == b"[user]hi[assistant]"


def test_what_cannot_fit_is_not_encoded_and_a_long_history_is_dropped() -> None:
    backend = ScriptedBackend("A", context=100)
    out = run_chat(backend, "x" * 3000, "hi")
    assert "more than any 100 tokens have" in out.replace("\n", " ")
    assert bytes(backend.requests[0].prompt) == b"[user]hi[assistant]"


def test_errors_are_shown_and_counted_and_the_chat_continues() -> None:
    out = console()
    backend = ScriptedBackend("ab", error=LinkDown("the \x1b[31mcloud is gone"))
    assert chat(backend, "cloud", out, ChatSettings(), io.StringIO("one\ntwo")) == 2
    assert output(out).count("error: the \\x1b[31mcloud is gone") == 2
    assert bytes(backend.requests[1].prompt) == b"[user]two[assistant]"
    assert objects(backend, "one") == [{"error": "the \x1b[31mcloud is gone"}]


def test_an_interrupted_answer_is_remembered() -> None:
    backend = ScriptedBackend("ab", error=KeyboardInterrupt())  # type: ignore[arg-type]
    out = run_chat(backend, "one", "two")
    assert "interrupted" in out
    assert backend.closed.is_set()
    assert b"[assistant]ab[user]two" in bytes(backend.requests[1].prompt)
    (answer, *_) = objects(backend, "one")
    assert (answer["finish"], answer["bytes_up"], answer["text"]) == ("interrupted", None, "ab")


def test_a_model_cannot_control_the_terminal() -> None:
    out = run_chat(ScriptedBackend("[bold]\x1b]0;title\x07[/bold] :smile: [red]\x1b[2J"), "hi")
    assert "[bold]\\x1b]0;title\\x07[/bold] :smile: [red]\\x1b[2J" in out


def test_a_person_sees_the_legend_once_and_leaves_with_the_end_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Iterator[str | BaseException] = iter(["hi", KeyboardInterrupt(), "again", EOFError()])

    def line(*_: object) -> str:
        line_or_error = next(lines)
        if isinstance(line_or_error, str):
            return line_or_error
        raise line_or_error

    out = console()
    monkeypatch.setattr(out, "input", line)
    backend = ScriptedBackend("A")
    assert chat(backend, "edge", out) == 0
    assert output(out).count("device, confirmed by the cloud") == 1
    assert len(backend.requests) == 2


def test_max_tokens_reach_the_backend() -> None:
    backend = ScriptedBackend("A")
    run_chat(backend, "hi", max_tokens=5)
    run_chat(backend, "hi", max_tokens=500)
    run_chat(backend, "hi")
    assert [request.max_tokens for request in backend.requests] == [5, 200 - 19, 200 - 19]
