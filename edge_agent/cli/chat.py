"""A chat in the terminal, each token in the colour of its source: device, cloud, or drafted and confirmed.

On a terminal: a prompt, colours, a line of statistics after each answer; Ctrl-C ends the running answer, Ctrl-D the
chat. Otherwise, or with `as_json`: one question for each line of input, and plain text or one JSON object for each
answer. Knows nothing about HTTP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.text import Text

from isthmus.edge_agent.cli.chat_answer import ChatAnswer, status_line
from isthmus.edge_agent.cli.terminal_text import escape_control
from isthmus.edge_agent.language.detokenize import AnswerEvent, Detokenizer, Outcome, TextDelta, close, detokenize
from isthmus.edge_agent.language.request import GenerationBackend, GenerationRequest, Source
from isthmus.edge_agent.language.switching import ask_again
from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.policy.prices import Prices
from isthmus.models.errors import ContextExceeded, IsthmusError
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.messages import GREEDY, Sampling

COLOURS: dict[Source, str] = {"edge": "green", "draft": "cyan", "cloud": "magenta"}
LEGEND: dict[Source, str] = {"edge": "the device", "draft": "device, confirmed by the cloud", "cloud": "the cloud"}
MIN_ANSWER_TOKENS = 64  # of the context that are left for an answer; older messages are dropped to make room
HELP = (
    "/arm auto|edge|cloud|verify|handoff|cascade   /reset   /help   /quit      Ctrl-C ends an answer, Ctrl-D the chat"
)


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`max_tokens` None: what is left of the context."""

    system: str = ""
    max_tokens: int | None = None
    sampling: Sampling = GREEDY
    prices: Prices = Prices()
    as_json: bool = False


class ChatSession:
    """The messages so far, and how answers are displayed."""

    def __init__(
        self,
        backend: GenerationBackend,
        arm: Arm,
        console: Console,
        settings: ChatSettings,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._arm = arm
        self._console = console
        self._settings = settings
        self._clock = clock
        self._messages: list[Message] = []
        self.failed = 0  # answers

    def command(self, line: str) -> bool:
        """Run a slash command; False: leave the chat."""
        name, _, argument = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._messages.clear()
            self._note("the conversation was reset")
        elif name == "/arm":
            self._set_arm(argument.strip())
        else:
            self._note(HELP if name == "/help" else f"unknown command {escape_control(name)}; {HELP}")
        return True

    def answer(self, question: str) -> None:
        """Generate, display and remember an answer. An interrupted one is remembered, one that failed is not."""
        self._messages.append(Message("user", question))
        answer = ChatAnswer()
        try:
            self._generate(answer)
        except IsthmusError as error:
            self._messages.pop()
            self.failed += 1
            self._print_error(str(error))
            return
        self._messages.append(Message("assistant", answer.text))
        self._report(question, answer)

    def _generate(self, answer: ChatAnswer) -> None:
        start_s = self._clock()
        events = ask_again(self._backend, self._arm, self._ask)
        try:
            for event in events:
                answer.total_s = self._clock() - start_s
                if isinstance(event, Outcome):
                    answer.outcome = event
                    continue
                for delta in event:
                    self._append(answer, delta)
        except KeyboardInterrupt:
            answer.total_s = self._clock() - start_s
        finally:
            close(events)
            if not self._settings.as_json and answer.tokens:
                self._console.print()

    def _ask(self, tokenizer: Tokenizer) -> Iterator[AnswerEvent]:
        return detokenize(self._backend.generate(self._request(tokenizer)), Detokenizer(tokenizer))

    def _append(self, answer: ChatAnswer, delta: TextDelta) -> None:
        answer.text += delta.text
        if delta.token:
            answer.source_tokens[delta.token.source] += 1
            answer.first_s = answer.total_s if answer.first_s is None else answer.first_s
        if delta.text and not self._settings.as_json:
            colour = COLOURS[delta.token.source] if delta.token else ""
            self._console.print(Text(escape_control(delta.text), style=colour), end="", soft_wrap=True)

    def _request(self, tokenizer: Tokenizer) -> GenerationRequest:
        """Drops the oldest messages to make room. Raises ContextExceeded if the last question alone is too long."""
        context, settings = self._backend.arm_context(self._arm), self._settings
        system = [Message("system", settings.system)] if settings.system else []
        while True:
            try:
                prompt = tuple(tokenizer.chat([*system, *self._messages], context))
                if len(prompt) + min(MIN_ANSWER_TOKENS, context // 4) <= context:
                    break
                raise ContextExceeded(f"{len(prompt)} tokens are too many for a context of {context}")
            except ContextExceeded:
                if len(self._messages) < 3:
                    raise
            del self._messages[:2]
            self._note("the context is full: the oldest question and its answer were dropped")
        room = context - len(prompt)
        max_tokens, messages = min(settings.max_tokens or room, room), [*system, *self._messages]
        return GenerationRequest(
            prompt,
            max_tokens,
            self._arm,
            settings.sampling,
            vocabulary=tokenizer.vocabulary,
            encode=lambda other: other.chat(messages, context),
        )

    def _set_arm(self, name: str) -> None:
        arms = self._backend.arms()
        arm = next((arm for arm in arms if arm == name), None)
        if arm is None:
            available = ", ".join(arms)
            self._note(f"arm {escape_control(name)!r} is not available; available are {available}; now {self._arm}")
            return
        self._arm = arm
        self._note(f"the arm is now {arm}")

    def _report(self, question: str, answer: ChatAnswer) -> None:
        statistics = answer.statistics(self._settings.prices)
        if self._settings.as_json:
            self._print_json({"question": question, "text": answer.text, "asked": self._arm, **statistics})
        else:
            self._note(status_line(statistics))

    def _print_error(self, message: str) -> None:
        if self._settings.as_json:
            self._print_json({"error": message})
        else:
            self._console.print(Text(f"error: {escape_control(message)}", style="red"), soft_wrap=True)

    def _print_json(self, value: dict[str, object]) -> None:
        self._console.file.write(json.dumps(value) + "\n")
        self._console.file.flush()

    def _note(self, message: str) -> None:
        if not self._settings.as_json:
            self._console.print(Text(message, style="dim"), soft_wrap=True)


def chat(
    backend: GenerationBackend,
    arm: Arm,
    console: Console,
    settings: ChatSettings = ChatSettings(),
    source: TextIO | None = None,
) -> int:
    """Run a chat until its input ends. `source` None: a person at the terminal. Returns how many answers failed."""
    session = ChatSession(backend, arm, console, settings)
    if source is None and not settings.as_json:
        legend = [(f"■ {LEGEND[made_by]}   ", COLOURS[made_by]) for made_by in COLOURS]
        console.print(Text.assemble(*legend, (f"\n{HELP}", "dim")))
    for line in read_lines(console) if source is None else source:
        line = line.strip()
        if line.startswith("/"):
            if not session.command(line):
                break
        elif line:
            session.answer(line)
    return session.failed


def read_lines(console: Console) -> Iterator[str]:
    """Lines that a person types, until Ctrl-D; Ctrl-C discards the current one."""
    while True:
        try:
            yield console.input(Text("› ", style="bold"))
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return
