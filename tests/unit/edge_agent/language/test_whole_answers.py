"""Agents that route whole answers, between models of one vocabulary and of two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language import agent as module
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.detokenize import Detokenizer, detokenize
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.models.errors import InvalidInput, LinkDown
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import Sampling
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_router import write_tiny_verifier
from tests.unit.edge_agent.language.fake_cloud import FakeCloud, model_info
from tests.unit.edge_agent.language.scripted import byte_tokenizer

BYTES = byte_tokenizer()  # another vocabulary than the tiny model's
OTHER = model_info(BYTES)
GOOD, BAD = 3.0, -3.0  # scores of every answer, as logits
NewAgent = Callable[..., LanguageAgent]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)


@pytest.fixture
def new_agent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewAgent]:
    """`new_agent(cloud, bias)`; agents are closed after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "BREAKER", BreakerLimits(1, 0.02, 0.05))
    made: list[LanguageAgent] = []

    def build(cloud: FakeCloud, bias: float, **settings: Any) -> LanguageAgent:
        bundle = write_tiny_verifier(tmp_path / "router", Checkpoint.open(folder), cloud.models[0], bias)
        common = {"model": str(folder), "router": bundle, "context": 64, "threads": 1, "connect_s": 10.0}
        config = LanguageConfig(clouds=(cloud.target,), **{**common, "quality": 0.9, "wait_s": 0.1, **settings})
        made.append(LanguageAgent(config))
        return made[-1]

    yield build
    for agent in made:
        agent.close()


@pytest.fixture
def other() -> Iterator[FakeCloud]:
    cloud = FakeCloud(OTHER, tokenizers=[BYTES.to_bytes()])
    yield cloud
    cloud.stop()


def said(agent: LanguageAgent, arm: Any = "cascade", **settings: Any) -> tuple[list[Token], Summary]:
    prompt = tuple(agent.tokenizer_for(arm).encode("AB"))
    vocabulary = agent.tokenizer_for(arm).vocabulary
    request = GenerationRequest(
        prompt, 5, arm, vocabulary=vocabulary, **{"encode": lambda other: other.encode("AB"), **settings}
    )
    *made, summary = agent.generate(request)
    assert isinstance(summary, Summary)
    return [token for token in made if isinstance(token, Token)], summary


def test_a_good_answer_is_the_devices(other: FakeCloud, new_agent: NewAgent) -> None:
    agent = new_agent(other, GOOD)
    assert agent.arms() == ("auto", "edge", "cloud", "cascade") and agent.context == 512
    tokens, summary = said(agent)
    assert {token.source for token in tokens} == {"edge"} and not other.openings
    assert (summary.arm, summary.degraded) == ("cascade", False) and summary.why.startswith("fastest at 0.9: cascade")
    assert [token.id for token in tokens] == [token.id for token in said(agent, "edge")[0]]


def test_a_bad_answer_is_the_clouds_in_its_own_vocabulary(other: FakeCloud, new_agent: NewAgent) -> None:
    tokens, summary = said(new_agent(other, BAD), top_logprobs=1)
    assert [token.id for token in tokens] == [67, 68, 69, 70, 71] and {token.source for token in tokens} == {"cloud"}
    assert all(token.tokenizer is not None and token.tokenizer.vocabulary == BYTES.vocabulary for token in tokens)
    assert other.openings[0].tokens == (65, 66) and tokens[0].top == ((67, -0.25),)
    assert (summary.prompt_tokens, summary.tokens, summary.arm, summary.finish) == (2, 5, "cascade", "length")
    assert "the device's answer scored 5% after 5 tokens, 50% needed" in summary.why and summary.bytes_up > 0


def test_its_text_is_the_clouds(other: FakeCloud, new_agent: NewAgent) -> None:
    agent = new_agent(other, BAD)
    assert agent.answer("AB", max_tokens=3, arm="cascade").text == "^_`", "the template ends with ]"
    tokenizer = agent.tokenizer_for("cascade")
    tokens, summary = said(agent)
    *deltas, outcome = detokenize(iter([*tokens, summary]), Detokenizer(tokenizer))
    assert "".join(delta.text for each in deltas for delta in each) == "CDEFG"  # type: ignore[union-attr]
    assert outcome.tokens == 5  # type: ignore[union-attr]


def test_auto_routes_whole_answers_where_tokens_cannot_be(other: FakeCloud, new_agent: NewAgent) -> None:
    agent = new_agent(other, BAD, objective="cheapest")
    tokens, summary = said(agent, "auto")
    assert tokens[0].id == 67 and summary.arm == "cascade" and "against cloud" in summary.why
    assert {token.source for token in said(new_agent(other, GOOD, objective="cheapest"), "auto")[0]} == {"edge"}


def test_an_engine_may_sample(other: FakeCloud, new_agent: NewAgent) -> None:
    assert said(new_agent(other, BAD), sampling=Sampling(0.8))[0][0].id == 67


def test_quality_decides(other: FakeCloud, new_agent: NewAgent) -> None:
    agent = new_agent(other, BAD)
    assert {token.source for token in said(agent, quality=0.5)[0]} == {"edge"}, "a level of threshold 0"
    tokens, summary = said(new_agent(other, GOOD), quality=0.99)
    assert tokens[0].id == 67 and "no level of whole answers keeps 0.99" in summary.why


def test_without_the_cloud_the_device_answers_and_says_so(other: FakeCloud, new_agent: NewAgent) -> None:
    agent, waiting = new_agent(other, BAD), new_agent(other, BAD, on_loss="wait")
    said(agent), said(waiting)
    other.stop()
    tokens, summary = said(agent)
    assert {token.source for token in tokens} == {"edge"} and len(tokens) == 5
    assert summary.degraded and (summary.tokens, summary.arm) == (5, "cascade")
    with pytest.raises(LinkDown):
        said(waiting)


def test_one_vocabulary_needs_no_second_encoding(folder: Path, new_agent: NewAgent) -> None:
    cloud = FakeCloud(model_info(Checkpoint.open(folder).tokenizer))
    tokens, summary = said(new_agent(cloud, BAD), encode=None)
    prompt = Checkpoint.open(folder).tokenizer.encode("AB")
    assert [token.id for token in tokens] == [prompt[-1] + 1 + index for index in range(5)]
    assert summary.arm == "cascade" and [(span.arm, span.tokens) for span in summary.spans] == [("cloud", 5)]
    cloud.stop()


def test_what_is_missing_is_one_line(other: FakeCloud, new_agent: NewAgent, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="the prompt has no `encode`, which arm cascade needs for the vocabulary of"):
        said(new_agent(other, BAD), encode=None)
    with pytest.raises(InvalidInput, match="needs a router bundle that scores whole answers, and there is none"):
        said(new_agent(other, BAD, router=None))
    agent = new_agent(other, BAD)
    other.models = (model_info(BYTES, "huge"),)
    fresh = LanguageAgent(LanguageConfig(str(folder), (other.target,), router=agent.config.router, connect_s=10.0))
    with (
        fresh,
        pytest.raises(InvalidInput, match="arm cascade: no router bundle is for huge .* tiny-router is for big"),
    ):
        said(fresh)
