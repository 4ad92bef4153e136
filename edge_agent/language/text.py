"""Prompts and answers as text, for programs that call an agent from Python, with or without asyncio.

    text or messages -> chat template -> GenerationRequest -> generate -> tokens -> whole characters

Knows nothing about how tokens are generated.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from isthmus.edge_agent.language.detokenize import AnswerEvent, Detokenizer, Outcome, close, detokenize
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.language.switching import ask_again
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import InvalidInput
from isthmus.models.messages import GREEDY, Sampling

if TYPE_CHECKING:
    from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer

Prompt = str | Sequence[Mapping[str, str]]
Event = TypeVar("Event")


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """A whole answer. finish: "length" at max_tokens. summary: how it came to be; None if a stop string ended it."""

    text: str
    finish: Literal["stop", "length"]
    tokens: int
    summary: Summary | None


class TextInterface:
    """What an agent for prompts offers beside `generate`. Arguments of all four methods:

    prompt: a question, or the messages of a chat, each {"role": "user", "content": ...}. max_tokens: of the answer;
    None for what the context leaves. arm: who generates. sampling: greedy, unless told otherwise. stop: strings that
    end the answer, which does not contain them.

    They raise InvalidInput for what cannot be answered, AgentClosed after `close`, and IsthmusError as `generate`.
    """

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        """What encodes prompts for an arm, and decodes its answers."""
        raise NotImplementedError

    def arm_context(self, arm: Arm) -> int:
        """Tokens of prompt and answer together, by this arm."""
        raise NotImplementedError

    def generate(self, request: GenerationRequest) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary."""
        raise NotImplementedError

    def answer(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        arm: Arm = "auto",
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> TextAnswer:
        """The whole answer."""
        return whole(list(self._events(prompt, max_tokens, arm, sampling, stop)))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        arm: Arm = "auto",
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of the answer as they are there. Closing it, or leaving its loop, ends the answer."""
        return pieces(self._events(prompt, max_tokens, arm, sampling, stop))

    async def aanswer(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        arm: Arm = "auto",
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> TextAnswer:
        """As `answer`, for asyncio. A task that is cancelled ends at once, and generation before the next token."""
        events = self._events(prompt, max_tokens, arm, sampling, stop)
        return whole([event async for event in in_threads(events)])

    def astream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        arm: Arm = "auto",
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> AsyncGenerator[str, None]:
        """As `stream`, for asyncio. A task that is cancelled ends at once, and generation before the next token."""
        return in_threads(pieces(self._events(prompt, max_tokens, arm, sampling, stop)))

    def _events(
        self, prompt: Prompt, max_tokens: int | None, arm: Arm, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[AnswerEvent]:
        listed = isinstance(stop, Sequence) and not isinstance(stop, str)
        if not listed or not all(isinstance(each, str) and each for each in stop):
            raise InvalidInput("stop is a list of strings, none of them empty")
        messages = messages_of(prompt)

        def ask(tokenizer: Tokenizer) -> Iterator[AnswerEvent]:
            context = self.arm_context(arm)
            length = context if max_tokens is None else max_tokens
            request = GenerationRequest(
                tuple(tokenizer.chat(messages, context)),
                length,
                arm,
                sampling,
                vocabulary=tokenizer.vocabulary,
                encode=lambda other: other.chat(messages, context),
            )
            return detokenize(self.generate(request), Detokenizer(tokenizer, stop))

        return ask_again(self, arm, ask)


def whole(events: Sequence[AnswerEvent]) -> TextAnswer:
    """The answer of these events, the last of which is its Outcome."""
    text = "".join(delta.text for event in events if not isinstance(event, Outcome) for delta in event)
    outcome = events[-1]
    assert isinstance(outcome, Outcome)
    return TextAnswer(text, outcome.finish, outcome.tokens, outcome.summary)


def pieces(events: Iterator[AnswerEvent]) -> Iterator[str]:
    """The text of events, without empty pieces."""
    try:
        for event in events:
            if not isinstance(event, Outcome) and (text := "".join(delta.text for delta in event)):
                yield text
    finally:
        close(events)


def messages_of(prompt: Prompt) -> list[Message]:
    """The messages of a prompt. Raises InvalidInput for anything else, naming what it is."""
    from isthmus.models.language.checkpoint.tokenizer import Message

    if isinstance(prompt, str):
        return [Message("user", prompt)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        given = "an empty list" if isinstance(prompt, list) else type(prompt).__name__
        raise InvalidInput(f"a prompt is a text or a list of messages, got {given}")
    return [Message(*role_and_content(index, message)) for index, message in enumerate(prompt)]


def role_and_content(index: int, message: object) -> tuple[str, str]:
    """The two strings of a message. Raises InvalidInput for anything else."""
    match message:
        case {"role": str(role), "content": str(content), **others} if not others:
            return role, content
    raise InvalidInput(f"message {index} of the prompt: expected the strings role and content, and no other")


async def in_threads(events: Iterator[Event]) -> AsyncGenerator[Event, None]:
    """Iterate `events`, each step in a thread. When this ends early they are closed after the step under way."""
    stepping = threading.Lock()
    ended = object()

    def step() -> Any:
        with stepping:
            return next(events, ended)

    def end() -> None:
        with stepping:
            close(events)

    loop = asyncio.get_running_loop()
    try:
        while (event := await loop.run_in_executor(None, step)) is not ended:
            yield event
    finally:
        loop.run_in_executor(None, end)
