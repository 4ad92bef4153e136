"""The prompt loop of a device alone, over a tiny model; with a cloud it is watched in tests/contract."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.metrics import LanguageMetrics
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.models.errors import AnswerCancelled, BundleError, ContextExceeded, InvalidInput, LinkDown
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.sampling import choose, log_softmax
from isthmus.models.messages import NOTHING, Sampling
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff

CONTEXT = 64
NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)


@pytest.fixture(scope="module")
def agent(folder: Path) -> Iterator[LanguageAgent]:
    with LanguageAgent(LanguageConfig(str(folder), context=CONTEXT, threads=1)) as made:
        yield made


def lost_agent(folder: Path, **settings: Any) -> LanguageAgent:
    """Its cloud does not exist."""
    return LanguageAgent(LanguageConfig(str(folder), (NOWHERE,), context=CONTEXT, threads=1, connect_s=5, **settings))


def said(agent: LanguageAgent, ask: GenerationRequest) -> tuple[list[Token], Summary]:
    *tokens, summary = agent.generate(ask)
    assert isinstance(summary, Summary)
    return [token for token in tokens if isinstance(token, Token)], summary


@pytest.mark.parametrize("prompt", [(65,), tuple(range(65, 91))])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 0.95, 3)])
def test_the_device_alone_says_what_its_model_says(
    agent: LanguageAgent, folder: Path, prompt: tuple[int, ...], sampling: Sampling
) -> None:
    tokens, summary = said(agent, GenerationRequest(prompt, 12, "edge", sampling, top_logprobs=2))
    decoder, text = OnnxDecoder(Checkpoint.open(folder), CONTEXT, threads=1), list(prompt)
    logits_V = decoder.extend(text)
    for token in tokens:
        assert token.id == choose(logits_V, sampling, len(text))
        logs_V = log_softmax(logits_V)
        assert token.logprob == pytest.approx(logs_V[token.id], abs=1e-3)
        assert token.top[0] == (logs_V.argmax(), pytest.approx(logs_V.max(), abs=1e-3)) and len(token.top) == 2
        text.append(token.id)
        logits_V = decoder.extend([token.id])
    assert {token.source for token in tokens} == {"edge"}
    ended = tokens[-1].id in agent.tokenizer.eos_ids
    assert replace(summary, device=NOTHING) == Summary(
        "stop" if ended else "length", len(prompt), len(tokens), "edge", "requested"
    )
    assert 0 < summary.device.tokens < len(text), "what other answers began with is not read again"
    assert ended or len(tokens) == 12


def test_an_answer_ends_at_an_end_of_text(agent: LanguageAgent) -> None:
    for seed in range(200):
        tokens, summary = said(agent, GenerationRequest((65, 66), 30, "edge", Sampling(2.0, 1.0, seed)))
        ends = [token.id in agent.tokenizer.eos_ids for token in tokens]
        assert not any(ends[:-1])
        assert summary.finish == ("stop" if ends[-1] else "length") and summary.tokens == len(tokens)
        if ends[-1] and len(tokens) < 30:
            return
    raise AssertionError("no answer ended early")


def test_max_tokens_is_cut_to_what_the_context_leaves(agent: LanguageAgent) -> None:
    prompt = (65,) * (CONTEXT - 3)
    tokens, summary = said(agent, GenerationRequest(prompt, 1000, "edge"))
    assert len(tokens) == summary.tokens == 3 and summary.finish == "length"
    tokens, _ = said(agent, GenerationRequest((65,) * (CONTEXT - 1), 1000, "edge"))
    assert len(tokens) == 1


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (GenerationRequest((), 5, "edge"), "no tokens"),
        (GenerationRequest((65,) * CONTEXT, 5, "edge"), "holds 64"),
        (GenerationRequest((65,), 0, "edge"), "max_tokens is 0"),
        (GenerationRequest((65, 259), 5, "edge"), "vocabulary of 259"),
        (GenerationRequest((-1, 65), 5, "edge"), "vocabulary of 259"),
        (GenerationRequest((65,), 5, "auto", quality=1.5), "quality is 1.5, expected 0 to 1"),
        (GenerationRequest((65,), 5, "cloud"), "needs a cloud"),
        (GenerationRequest((65,), 5, "verify"), "needs a cloud"),
        (GenerationRequest((65,), 5, "handoff"), "needs a cloud"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    agent: LanguageAgent, ask: GenerationRequest, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        agent.generate(ask)


def test_a_prompt_that_leaves_no_room_is_told_from_other_errors(folder: Path, agent: LanguageAgent) -> None:
    with lost_agent(folder) as lost:
        assert [lost.arm_context(arm) for arm in ("edge", "cloud", "verify", "auto")] == [CONTEXT, 512, 512, 512]
        for arm in ("edge", "cloud", "verify", "auto"):
            with pytest.raises(ContextExceeded):
                lost.generate(GenerationRequest((65,) * 512, 5, arm))  # type: ignore[arg-type]


def test_an_answer_that_is_given_up_while_it_waits_counts_as_closed(folder: Path) -> None:
    registry, cancelled = CollectorRegistry(), threading.Event()
    with LanguageAgent(LanguageConfig(str(folder), threads=1), LanguageMetrics(registry)) as agent:
        events = agent.generate(GenerationRequest((65, 66), 20, "edge"), cancelled)
        next(events)
        cancelled.set()
        with pytest.raises(AnswerCancelled):
            next(events)
    labels = {"arm": "edge", "reason": "closed"}
    assert registry.get_sample_value("isthmus_edge_unfinished_answers_total", labels) == 1


def test_auto_without_a_cloud_is_the_device(agent: LanguageAgent) -> None:
    tokens, summary = said(agent, GenerationRequest((65, 66, 67), 10, "auto"))
    assert [token.id for token in tokens] == [
        token.id for token in said(agent, GenerationRequest((65, 66, 67), 10, "edge"))[0]
    ]
    assert (summary.arm, summary.why, summary.spans) == ("edge", "no cloud is configured", ())


@pytest.mark.parametrize("quality", [0.0, 0.8, 1.0])
def test_auto_with_a_lost_cloud_goes_on_alone_and_says_so(folder: Path, tmp_path: Path, quality: float) -> None:
    handoff = write_tiny_handoff(tmp_path / "handoff", Checkpoint.open(folder))
    with lost_agent(folder, handoff=handoff) as lost:
        ask = GenerationRequest((65, 66, 67), 12, "auto", quality=quality)
        tokens, summary = said(lost, ask)
        expected = [token.id for token in said(lost, replace(ask, arm="edge"))[0]]
    assert [token.id for token in tokens] == expected and {token.source for token in tokens} == {"edge"}
    assert (summary.arm, [span.arm for span in summary.spans]) == ("auto", ["edge"])
    assert summary.degraded == (quality > 0)


def test_what_it_is(agent: LanguageAgent) -> None:
    assert (agent.name, agent.context, agent.arms()) == ("tiny", CONTEXT, ("auto", "edge"))
    assert list(agent.replicas) == []


def test_two_answers_at_once_are_each_what_they_are_alone(agent: LanguageAgent) -> None:
    asks = [
        GenerationRequest(tuple(range(65 + index, 75 + index)), 20, "edge", Sampling(0.8, 1.0, index))
        for index in range(4)
    ]
    alone = [said(agent, ask) for ask in asks]
    start = threading.Barrier(4)

    def together(ask: GenerationRequest) -> Any:
        start.wait(10)
        return said(agent, ask)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(together, asks))
    assert [(tokens, replace(how, device=NOTHING)) for tokens, how in found] == [
        (tokens, replace(how, device=NOTHING)) for tokens, how in alone
    ]


def test_an_answer_given_up_lets_the_next_one_run(agent: LanguageAgent) -> None:
    first = agent.generate(GenerationRequest((65, 66), 20, "edge"))
    next(first)
    first.close()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(said, agent, GenerationRequest((65, 66), 3, "edge")).result(30)[1].tokens == 3


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(BundleError, match="no such file"):
        LanguageAgent(LanguageConfig("/nowhere"))


def test_answers_are_counted(folder: Path) -> None:
    registry = CollectorRegistry()
    with LanguageAgent(LanguageConfig(str(folder), threads=1), LanguageMetrics(registry)) as agent:
        made, _ = said(agent, GenerationRequest((65, 66), 4, "edge"))
    assert registry.get_sample_value("isthmus_edge_tokens_total", {"source": "edge"}) == len(made)
    answers = {"arm": "edge", "degraded": "false"}
    assert registry.get_sample_value("isthmus_edge_answers_total", answers) == 1


def test_answers_that_end_early_are_counted_too(folder: Path) -> None:
    registry = CollectorRegistry()
    settings: dict[str, Any] = {"context": CONTEXT, "threads": 1, "connect_s": 5, "on_loss": "wait", "wait_s": 0.1}
    config = LanguageConfig(str(folder), (NOWHERE,), **settings)

    def unfinished(arm: str, reason: str) -> float | None:
        labels = {"arm": arm, "reason": reason}
        return registry.get_sample_value("isthmus_edge_unfinished_answers_total", labels)

    with LanguageAgent(config, LanguageMetrics(registry)) as agent:
        first = agent.generate(GenerationRequest((65, 66), 20, "edge"))
        next(first)
        first.close()  # type: ignore[attr-defined]
        with pytest.raises(LinkDown):
            said(agent, GenerationRequest((65, 66), 20, "verify"))
        whole = agent.generate(GenerationRequest((65, 66), 3, "edge"))
        while not isinstance(next(whole), Summary):
            pass
        whole.close()  # type: ignore[attr-defined]
    assert (unfinished("edge", "closed"), unfinished("verify", "failed"), unfinished("verify", "closed")) == (1, 1, 0)


@pytest.mark.parametrize("arm", ["cloud", "verify"])
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_when_the_cloud_is_not_there_the_device_answers_alone(
    folder: Path, agent: LanguageAgent, arm: Any, draft: Any
) -> None:
    with lost_agent(folder, draft=draft) as lost:
        assert lost.arms() == ("auto", "edge", "cloud", "verify") and lost.context == 512
        tokens, summary = said(lost, GenerationRequest((65, 66, 67), 10, arm, top_logprobs=0))
        expected, _ = said(agent, GenerationRequest((65, 66, 67), 10, "edge", top_logprobs=0))
        assert [(token.id, token.source) for token in tokens] == [(token.id, "edge") for token in expected]
        logprobs = [token.logprob for token in expected]  # the last bits depend on which tokens were run together
        assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-3)
        assert summary.degraded and summary.arm == arm and summary.why == "no cloud answers"


def test_when_the_cloud_is_not_there_and_the_device_cannot_answer_it_says_so(folder: Path) -> None:
    with lost_agent(folder, on_loss="wait", wait_s=0.1) as waiting, pytest.raises(LinkDown, match="no cloud answered"):
        said(waiting, GenerationRequest((65, 66), 4, "verify"))
    with lost_agent(folder, wait_s=0.1) as lost:
        with pytest.raises(LinkDown, match="no cloud answered"):
            said(lost, GenerationRequest((65,) * (CONTEXT + 1), 4, "verify"))
        tokens = lost.generate(GenerationRequest((65,) * (CONTEXT - 1), 100, "verify"))
        assert [next(tokens), next(tokens)]  # the device holds so much, and no more
        with pytest.raises(LinkDown, match="no cloud answered"):
            next(tokens)
        assert said(lost, GenerationRequest((65, 66), 4, "edge"))[1].tokens == 4  # its model is free again


def test_an_answer_under_way_does_not_keep_the_model_from_another(folder: Path) -> None:
    with lost_agent(folder, wait_s=0.1) as lost:
        first = lost.generate(GenerationRequest((65, 66), 10, "edge"))
        next(first)
        tokens, summary = said(lost, GenerationRequest((65, 66), 10, "verify"))
        assert summary.degraded and {token.source for token in tokens} == {"edge"}
        rest = [event.id for event in first if isinstance(event, Token)]
        assert rest == [token.id for token in tokens][1:], "each has the text that it has alone"


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", Checkpoint.open(folder))


def test_layers_are_shared_where_there_is_a_bundle_for_it(folder: Path, bundle: Path) -> None:
    with lost_agent(folder) as agent, pytest.raises(InvalidInput, match="handoff needs a bundle of exits"):
        agent.generate(GenerationRequest((65,), 5, "handoff"))
    with lost_agent(folder, handoff=bundle) as agent:
        tokens, summary = said(agent, GenerationRequest((65, 66), 12, "handoff"))
        edge, _ = said(agent, GenerationRequest((65, 66), 12, "edge"))
    assert {token.source for token in tokens} == {"edge"} and [t.id for t in tokens] == [t.id for t in edge]
    assert summary.degraded and summary.arm == "handoff" and summary.why == "no cloud answers"


def test_a_bundle_of_another_model_is_refused(folder: Path, bundle: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(BundleError, match="belongs to the model"):
        lost_agent(other, handoff=bundle)


def test_an_agent_needs_a_model_or_a_cloud() -> None:
    with pytest.raises(InvalidInput, match="needs a model, a cloud, or both"):
        LanguageAgent(LanguageConfig())
    with pytest.raises(InvalidInput, match="a handoff bundle belongs to the device's model"):
        LanguageAgent(LanguageConfig(clouds=(NOWHERE,), handoff=Path("/nowhere")))
