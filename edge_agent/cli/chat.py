"""A chat in the terminal, over the prompt loop: each token in the colour of where it was made. Knows nothing of HTTP.

On a terminal: a prompt, colours, a line of figures after each answer; Ctrl-C ends the running answer, Ctrl-D the chat.
Otherwise, or with `as_json`: one question a line, plain answers or one JSON object an answer.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from isthmus.edge_agent.language.detokenize import Detokenizer, Outcome, Shown, close, read
from isthmus.edge_agent.language.request import GenerationRequest, Generator, Source
from isthmus.edge_agent.policy.arms import Arm
from isthmus.edge_agent.policy.prices import Prices
from isthmus.models.errors import InvalidInput, IsthmusError
from isthmus.models.language.checkpoint.tokenizer import Message
from isthmus.models.messages import GREEDY, Sampling

COLOURS: dict[Source, str] = {"edge": "green", "draft": "cyan", "cloud": "magenta"}
LEGEND: dict[Source, str] = {"edge": "the device", "draft": "device, confirmed by the cloud", "cloud": "the cloud"}
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # can make a line read as another one
ROOM_TOKENS = 64  # an answer wants at least this much of the context; older messages are forgotten for it
HELP = "/arm auto|edge|cloud|verify|handoff   /reset   /help   /quit      Ctrl-C ends an answer, Ctrl-D the chat"


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`max_tokens` None: what is left of the context."""

    system: str = ""
    max_tokens: int | None = None
    sampling: Sampling = GREEDY
    prices: Prices = Prices()
    as_json: bool = False


@dataclass(slots=True)
class Answer:
    """One answer as it grows. Seconds count from the question; `outcome` is missing when it was interrupted."""

    text: str = ""
    made: dict[Source, int] = field(default_factory=lambda: dict.fromkeys(COLOURS, 0))
    first_s: float | None = None
    total_s: float = 0.0
    outcome: Outcome | None = None

    @property
    def tokens(self) -> int:
        return sum(self.made.values())

    def figures(self, prices: Prices) -> dict[str, Any]:
        """For a person or a program; None where only an answer's end would have told."""
        summary = self.outcome.summary if self.outcome else None
        bytes_up = summary.bytes_up if summary else None
        own_s = self.total_s - summary.cloud_s if summary else None
        return {
            "finish": self.outcome.finish if self.outcome else "interrupted",
            "tokens": self.tokens,
            "made": dict(self.made),
            "tokens_per_s": self.tokens / self.total_s if self.total_s > 0 else None,
            "first_token_ms": None if self.first_s is None else self.first_s * 1000,
            "device_share": (self.made["edge"] + self.made["draft"]) / self.tokens if self.tokens else None,
            "bytes_up": bytes_up,
            "bytes_down": summary.bytes_down if summary else None,
            "rtt_ms": summary.rtt_s * 1000 if summary and summary.rtt_s is not None else None,
            "usd": prices.usd(summary.bytes_up, summary.cloud_s, own_s or 0.0) if summary else None,
            "arm": summary.arm if summary else None,
            "why": summary.why if summary else None,
            "spans": [asdict(span) for span in summary.spans] if summary else None,
            "degraded": summary.degraded if summary else None,
        }


class Chat:
    """The conversation so far, and how it is shown."""

    def __init__(
        self,
        generator: Generator,
        arm: Arm,
        console: Console,
        settings: ChatSettings,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._generator = generator
        self._arm = arm
        self._console = console
        self._settings = settings
        self._clock = clock
        self._messages: list[Message] = []
        self.failed = 0  # answers

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._messages.clear()
            self._note("the conversation is forgotten")
        elif name == "/arm":
            self._choose(rest.strip())
        else:
            self._note(HELP if name == "/help" else f"unknown command {visible(name)}; {HELP}")
        return True

    def answer(self, question: str) -> None:
        """Ask, show, remember. An answer that failed is not remembered, one that was interrupted is."""
        self._messages.append(Message("user", question))
        answer = Answer()
        try:
            self._show(answer)
        except IsthmusError as error:
            self._messages.pop()
            self.failed += 1
            self._problem(str(error))
            return
        self._messages.append(Message("assistant", answer.text))
        self._report(question, answer)

    def _show(self, answer: Answer) -> None:
        start_s = self._clock()
        events = self._generator.generate(self._ask())
        try:
            for step in read(events, Detokenizer(self._generator.tokenizer)):
                answer.total_s = self._clock() - start_s
                if isinstance(step, Outcome):
                    answer.outcome = step
                    continue
                for shown in step:
                    self._count(answer, shown)
        except KeyboardInterrupt:
            answer.total_s = self._clock() - start_s
        finally:
            close(events)
            if not self._settings.as_json and answer.tokens:
                self._console.print()

    def _count(self, answer: Answer, shown: Shown) -> None:
        answer.text += shown.text
        if shown.token:
            answer.made[shown.token.source] += 1
            answer.first_s = answer.total_s if answer.first_s is None else answer.first_s
        if shown.text and not self._settings.as_json:
            colour = COLOURS[shown.token.source] if shown.token else ""
            self._console.print(Text(visible(shown.text), style=colour), end="", soft_wrap=True)

    def _ask(self) -> GenerationRequest:
        """Raises InvalidInput when the last question alone is too long. Forgets the oldest messages for room."""
        context = self._generator.context
        system = [Message("system", self._settings.system)] if self._settings.system else []
        while True:
            prompt = tuple(self._generator.tokenizer.chat([*system, *self._messages]))
            if len(prompt) + min(ROOM_TOKENS, context // 4) <= context:
                break
            if len(self._messages) < 3:
                raise InvalidInput(f"{len(prompt)} tokens are too many for a context of {context}")
            del self._messages[:2]
            self._note("the oldest question and answer are forgotten, the context is full")
        room = context - len(prompt)
        return GenerationRequest(
            prompt, min(self._settings.max_tokens or room, room), self._arm, self._settings.sampling
        )

    def _choose(self, name: str) -> None:
        arms = self._generator.arms()
        chosen = next((arm for arm in arms if arm == name), None)
        if chosen is None:
            self._note(f"{visible(name)!r} is not available; there is {', '.join(arms)}, now {self._arm}")
            return
        self._arm = chosen
        self._note(f"answers come by way of {chosen} now")

    def _report(self, question: str, answer: Answer) -> None:
        figures = answer.figures(self._settings.prices)
        if self._settings.as_json:
            self._json({"question": question, "text": answer.text, "asked": self._arm, **figures})
        else:
            self._note(status(figures))

    def _problem(self, message: str) -> None:
        if self._settings.as_json:
            self._json({"error": message})
        else:
            self._console.print(Text(f"error: {visible(message)}", style="red"), soft_wrap=True)

    def _json(self, value: dict[str, object]) -> None:
        self._console.file.write(json.dumps(value) + "\n")
        self._console.file.flush()

    def _note(self, message: str) -> None:
        if not self._settings.as_json:
            self._console.print(Text(message, style="dim"), soft_wrap=True)


def chat(
    generator: Generator,
    arm: Arm,
    console: Console,
    settings: ChatSettings = ChatSettings(),
    source: TextIO | None = None,
) -> int:
    """Talk until the input ends. `source` None: a person at the terminal. Returns how many answers failed."""
    talk = Chat(generator, arm, console, settings)
    if source is None and not settings.as_json:
        legend = [(f"■ {LEGEND[made]}   ", COLOURS[made]) for made in COLOURS]
        console.print(Text.assemble(*legend, (f"\n{HELP}", "dim")))
    for line in typed(console) if source is None else source:
        line = line.strip()
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line:
            talk.answer(line)
    return talk.failed


def typed(console: Console) -> Iterator[str]:
    """Lines of a person, until Ctrl-D; Ctrl-C drops what was typed."""
    while True:
        try:
            yield console.input(Text("› ", style="bold"))
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return


def visible(text: str) -> str:
    """Untrusted text for a terminal: control characters other than line feed and tab are shown as escapes."""
    return "".join(escape(char) if needs_escape(char) else char for char in text)


def needs_escape(char: str) -> bool:
    return (unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t") or char in BIDIRECTIONAL


def escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"


def status(figures: dict[str, Any]) -> str:
    """One line of figures; what is not known is left out."""
    forms = {
        "tokens": "{} tokens",
        "tokens_per_s": "{:.1f}/s",
        "first_token_ms": "first after {:.0f} ms",
        "device_share": "{:.0%} made on the device",
        "bytes_up": "{} B up",
        "bytes_down": "{} B down",
        "rtt_ms": "round trip {:.0f} ms",
        "usd": "${:.7f}",
        "arm": "{}",
    }
    parts = [form.format(figures[name]) for name, form in forms.items() if figures[name] is not None]
    if figures["finish"] == "interrupted":
        parts.append("interrupted")
    if figures["degraded"]:
        parts.append(f"DEGRADED: {visible(str(figures['why']))}")
    elif figures["arm"] == "auto":
        parts.append(visible(str(figures["why"])))
    return " · ".join(parts)
