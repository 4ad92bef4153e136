"""Prompts as text from Python, over a real agent of a tiny model, and over a scripted one where it matters when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent import LanguageAgent, LanguageConfig, Sampling, TextAnswer
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.language.text import TextInterface
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import AgentClosed, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from tests.bench.tiny_llama import write_tiny_llama
from tests.unit.edge_agent.language.scripted import ScriptedBackend

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


class Scripted(TextInterface):
    """The text interface of a scripted backend."""

    def __init__(self, **settings: Any) -> None:
        self.backend = ScriptedBackend(**settings)
        self.context = self.backend.context

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        return self.backend.tokenizer_for(arm)

    def arm_context(self, arm: Arm) -> int:
        return self.backend.arm_context(arm)

    def generate(self, request: GenerationRequest) -> Iterator[Token | Summary]:
        return self.backend.generate(request)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageAgent]:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)
    with LanguageAgent(LanguageConfig(str(folder), context=128, threads=1)) as made:
        yield made


def test_an_answer_is_text_and_its_pieces_are_the_same(agent: LanguageAgent) -> None:
    answer = agent.answer("Hello?", max_tokens=12)
    assert isinstance(answer, TextAnswer) and answer.summary is not None
    assert 1 <= answer.tokens <= 12 and answer.summary.arm == "edge"
    assert "".join(agent.stream("Hello?", max_tokens=12)) == answer.text
    sampled = agent.answer(CHAT, max_tokens=12, arm="edge", sampling=Sampling(1.5, 1.0, 3))
    assert sampled.text == agent.answer(CHAT, max_tokens=12, arm="edge", sampling=Sampling(1.5, 1.0, 3)).text


def test_asyncio_has_the_same_text(agent: LanguageAgent) -> None:
    async def main() -> tuple[TextAnswer, str]:
        return (
            await agent.aanswer("Hello?", max_tokens=12),
            "".join([piece async for piece in agent.astream("Hello?", max_tokens=12)]),
        )

    answer, streamed = asyncio.run(main())
    assert answer == agent.answer("Hello?", max_tokens=12) or answer.text == streamed
    assert streamed == agent.answer("Hello?", max_tokens=12).text


def test_a_stop_string_ends_the_answer_before_it() -> None:
    answer = Scripted(text="one two three").answer("?", stop=["two"])
    assert (answer.text, answer.finish, answer.summary) == ("one ", "stop", None)
    assert list(Scripted(text="one two three").stream("?", stop=["two"])) == list("one ")


def test_a_prompt_is_the_chat_template_of_its_messages() -> None:
    scripted = Scripted()
    scripted.answer(CHAT, max_tokens=3, arm="cloud")
    (request,) = scripted.backend.requests
    assert bytes(request.prompt) == b"[system]Be brief.[user]Hello?[assistant]"
    assert (request.max_tokens, request.arm) == (3, "cloud")
    scripted.answer("Hello?")
    assert bytes(scripted.backend.requests[1].prompt) == b"[user]Hello?[assistant]"
    assert scripted.backend.requests[1].max_tokens == scripted.context


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "a prompt is a text or a list of messages, got int"),
        (b"bytes", "got bytes"),
        ([], "got an empty list"),
        (["Hello?"], "message 0 of the prompt"),
        ([*CHAT, {"role": "user"}], "message 2 of the prompt"),
        ([{"role": "user", "content": None}], "the strings role and content"),
    ],
)
def test_what_is_no_prompt_is_named(agent: LanguageAgent, prompt: Any, message: str) -> None:
    for use in (agent.answer, agent.stream):
        with pytest.raises(InvalidInput, match=message):
            use(prompt)


@pytest.mark.parametrize("stop", ["word", [""], [3], 3, None])
def test_what_is_no_stop_is_named(agent: LanguageAgent, stop: Any) -> None:
    with pytest.raises(InvalidInput, match="stop is a list of strings"):
        agent.answer("Hello?", stop=stop)


@pytest.mark.parametrize("arguments", [{"arm": "moon"}, {"max_tokens": 0}, {"max_tokens": "many"}, {"sampling": 0.7}])
def test_wrong_arguments_are_named(agent: LanguageAgent, arguments: Any) -> None:
    with pytest.raises(InvalidInput, match=next(iter(arguments))):
        agent.answer("Hello?", **arguments)


def test_a_request_is_not_a_text(agent: LanguageAgent) -> None:
    with pytest.raises(InvalidInput, match="a request is a GenerationRequest, got str; `answer` takes text"):
        agent.generate("Hello?")  # type: ignore[arg-type]


def test_leaving_a_stream_ends_the_answer() -> None:
    scripted = Scripted(endless=True)
    for piece in (pieces := scripted.stream("?")):
        assert piece == "H"
        break
    pieces.close()  # type: ignore[attr-defined]
    assert scripted.backend.closed.is_set()


def test_a_cancelled_task_ends_the_answer() -> None:
    scripted = Scripted(endless=True, pause_s=0.001, context=100_000)

    async def main() -> None:
        task = asyncio.create_task(scripted.aanswer("?"))
        while not scripted.backend.started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert scripted.backend.closed.wait(10)


def test_what_is_raised_in_the_thread_is_raised_in_the_task() -> None:
    with pytest.raises(InvalidInput, match="no such arm"):
        asyncio.run(Scripted(error=InvalidInput("no such arm")).aanswer("?"))


def test_after_close_it_is_a_clear_error(tmp_path: Path) -> None:
    agent = LanguageAgent(LanguageConfig(str(write_tiny_llama(tmp_path / "tiny", scale=0.3)), context=64, threads=1))
    agent.close()
    for use in (agent.answer, agent.stream):
        with pytest.raises(AgentClosed, match="was closed"):
            use("Hello?")


def test_settings_of_another_kind_are_named() -> None:
    with pytest.raises(InvalidInput, match="config is str, expected a LanguageConfig"):
        LanguageAgent("smollm2")  # type: ignore[arg-type]


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    scripted = Scripted()
    with pytest.raises(ContextExceeded, match="more than any 200 tokens have"):
        scripted.answer("x" * 3000)
    assert scripted.backend.requests == []
