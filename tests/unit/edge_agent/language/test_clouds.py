"""Agents and clouds that hold the same model, another, or one of another vocabulary; and devices without any model."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language import agent as module
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.transport import health
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.errors import InvalidInput, LinkDown, PeerError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import ModelInfo, Sampling
from tests.bench.processes import free_port
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.edge_agent.language.fake_cloud import FakeCloud, model_info
from tests.unit.edge_agent.language.scripted import byte_tokenizer

BYTES = byte_tokenizer()  # another vocabulary than the tiny models'
RAW = BYTES.to_bytes()
BIG = model_info(BYTES)
PROMPT = (65, 66)
NewAgent = Callable[..., LanguageAgent]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "BREAKER", BreakerLimits(1, 0.02, 0.05))
    return tmp_path / "cache/isthmus/tokenizers"


@pytest.fixture
def new_cloud() -> Iterator[Callable[..., FakeCloud]]:
    made: list[FakeCloud] = []

    def build(*args: Any, **settings: Any) -> FakeCloud:
        made.append(FakeCloud(*args, **settings))
        return made[-1]

    yield build
    for cloud in made:
        cloud.stop()


@pytest.fixture
def new_agent() -> Iterator[NewAgent]:
    """`new_agent(*clouds, **settings)`; every agent is closed after the test."""
    made: list[LanguageAgent] = []

    def build(*clouds: str | FakeCloud, **settings: Any) -> LanguageAgent:
        targets = tuple(cloud if isinstance(cloud, str) else cloud.target for cloud in clouds)
        config = {"clouds": targets, "context": 64, "threads": 1, "connect_s": 10.0, "wait_s": 10.0, **settings}
        made.append(LanguageAgent(LanguageConfig(**config)))
        return made[-1]

    yield build
    for agent in made:
        agent.close()


def said(agent: LanguageAgent, arm: Any = "auto", tokens: int = 5, **settings: Any) -> tuple[list[int], Summary]:
    *made, summary = agent.generate(GenerationRequest(PROMPT, tokens, arm, **settings))
    assert isinstance(summary, Summary)
    return [token.id for token in made if isinstance(token, Token)], summary


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not come true")


def counted(tokens: int = 5) -> list[int]:
    return [PROMPT[-1] + 1 + index for index in range(tokens)]


# --- no model on the device


def test_a_device_without_a_model_uses_the_clouds(new_cloud: Any, new_agent: NewAgent, cache: Path) -> None:
    cloud = new_cloud(BIG, tokenizers=[RAW[:1000], RAW[1000:]])
    agent = new_agent(cloud)
    assert (agent.name, agent.cloud_name, agent.arms(), agent.context) == ("big", "big", ("auto", "cloud"), 512)
    assert agent.tokenizer.encode("AB") == list(PROMPT)
    ids, summary = said(agent)
    assert ids == counted() and (summary.arm, summary.why) == ("cloud", "the device has no model")
    assert agent.answer("AB", max_tokens=3).text == "^_`", "the template ends with ]"
    assert [file.name for file in cache.iterdir()] == [BYTES.fingerprint.hex()] and cloud.fetches == 1
    assert new_agent(cloud).answer("AB", max_tokens=3).text == "^_`" and cloud.fetches == 1


def test_it_may_look_its_drafts_up(new_cloud: Any, new_agent: NewAgent) -> None:
    cloud = new_cloud(BIG, tokenizers=[RAW])
    with pytest.raises(InvalidInput, match="needs drafts: a model on the device, or --draft lookup"):
        said(new_agent(cloud), "verify")
    agent = new_agent(cloud, draft="lookup")
    assert agent.arms() == ("auto", "cloud", "verify") and said(agent, "verify")[0] == counted()


@pytest.mark.parametrize("arm", ["edge", "handoff"])
def test_what_needs_a_model_is_refused_in_one_line(new_cloud: Any, new_agent: NewAgent, arm: str) -> None:
    with pytest.raises(InvalidInput, match=f"arm {arm} needs a (model on the device|bundle of exits), and none is"):
        said(new_agent(new_cloud(BIG, tokenizers=[RAW])), arm)


def test_it_waits_for_its_first_cloud(new_cloud: Any, new_agent: NewAgent) -> None:
    agent = new_agent(f"127.0.0.1:{(port := free_port())}", connect_s=0.0)
    assert not agent.ready and agent.name == "cloud"
    new_cloud(BIG, tokenizers=[RAW], port=port)
    assert said(agent)[0] == counted() and agent.ready


def test_without_a_cloud_it_says_so_in_one_line(new_agent: NewAgent) -> None:
    agent = new_agent("127.0.0.1:1", wait_s=0.1)
    for ask in (lambda: said(agent), lambda: agent.answer("hi")):
        with pytest.raises(LinkDown, match="no cloud answered within 0 s$"):
            ask()


def test_it_does_without_onnx_and_torch(new_cloud: Any) -> None:
    """A light start."""
    cloud = new_cloud(BIG, tokenizers=[RAW])
    program = (
        "import sys; from isthmus.edge_agent import LanguageAgent, LanguageConfig\n"
        f"with LanguageAgent(LanguageConfig(clouds=({cloud.target!r},), connect_s=10)) as agent:\n"
        "    print(agent.answer('AB', max_tokens=3).text, {'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "^_` set()\n", done.stderr


# --- clouds that cannot be used


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "NOT_FOUND: no model here has it"),
        ([RAW[:-1]], "bytes that are not the tokenizer"),
        ([RAW, b" "], f"more than the {len(RAW)} bytes"),
        ([RAW[:-1] + b"!"], "bytes that are not the tokenizer"),
        ([RAW, b""], "an empty part of a tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_the_declared_one_is_refused(
    new_cloud: Any, new_agent: NewAgent, cache: Path, parts: list[bytes], words: str
) -> None:
    agent = new_agent(new_cloud(BIG, tokenizers=parts))
    with pytest.raises(PeerError, match=words) as caught:
        said(agent)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("cloud 127.0.0.1:")
    assert not cache.exists()


def test_closing_ends_what_is_fetched(new_cloud: Any, new_agent: NewAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that sends nothing would otherwise be waited for."""
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 1e6)  # closing joins the prober's thread for as long
    cloud, end = new_cloud(BIG), threading.Event()
    cloud.tokenizers = (end.wait() and RAW for _ in range(1))
    agent = new_agent(cloud, connect_s=0.0)
    until(lambda: cloud.fetches == 1)
    closing = threading.Thread(target=agent.close, daemon=True)
    closing.start()
    closing.join(10)
    end.set()
    assert not closing.is_alive()


def test_all_clouds_together_are_waited_for_at_the_start(new_agent: NewAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr(
        LanguageLink, "wait_probed", lambda self, timeout_s: waits.append(timeout_s) or time.sleep(0.02)
    )
    new_agent("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", connect_s=0.03)
    assert waits[1] < waits[0] and waits[2] == 0


def test_a_wrong_name_is_one_line_and_the_device_answers_alone(
    new_cloud: Any, new_agent: NewAgent, folder: Path
) -> None:
    cloud = new_cloud(BIG, tokenizers=[RAW])
    with pytest.raises(PeerError, match="holds no language model 'huge', it holds big"):
        said(new_agent(cloud, cloud_model="huge"))
    agent = new_agent(cloud, cloud_model="huge", model=str(folder))
    assert said(agent)[1].degraded and cloud.fetches == 0
    assert list(agent.replicas.cloud.problems) == [cloud.target]


def test_replicas_with_different_models_are_one_line(new_cloud: Any, new_agent: NewAgent) -> None:
    first, second = new_cloud(BIG, tokenizers=[RAW]), new_cloud(model_info(BYTES, "other"), tokenizers=[RAW])
    agent = new_agent(first, second)
    problems = agent.replicas.cloud.problems
    (words,) = problems.values()
    assert "big" in words and "other" in words and "the same model" in words
    assert said(agent)[0] == counted()


# --- a model of the same vocabulary, and of another


def same_vocabulary(folder: Path, **changed: Any) -> ModelInfo:
    return model_info(Checkpoint.open(folder).tokenizer, **changed)


def test_other_weights_of_the_same_vocabulary_serve_every_arm_but_handoff(
    new_cloud: Any, new_agent: NewAgent, folder: Path, tmp_path: Path
) -> None:
    bundle = write_tiny_handoff(tmp_path / "handoff", Checkpoint.open(folder))
    cloud = new_cloud(same_vocabulary(folder, arms=("cloud", "verify", "handoff")))
    agent = new_agent(cloud, model=str(folder), handoff=bundle, quality=0.5)
    assert agent.arms() == ("auto", "edge", "cloud", "verify") and cloud.fetches == 0
    assert (agent.name, agent.aliases, agent.arm_context("edge"), agent.context) == ("tiny", ("big",), 64, 512)
    for arm in ("cloud", "verify", "auto"):
        assert said(agent, arm)[0] == counted()
    with pytest.raises(InvalidInput, match="one model by layers: the device holds tiny .*, the cloud big 626967202020"):
        said(agent, "handoff")
    assert {span.arm for span in said(agent)[1].spans} <= {"cloud", "verify"}, "no promise of the bundle counts"


def test_what_the_cloud_does_not_serve_is_refused(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    agent = new_agent(new_cloud(same_vocabulary(folder, arms=("cloud",))), model=str(folder))
    assert agent.arms() == ("auto", "edge", "cloud")
    with pytest.raises(InvalidInput, match="arm verify is not served for big in the cloud"):
        said(agent, "verify")
    ids, summary = said(agent)
    assert ids == counted() and {span.arm for span in summary.spans} == {"cloud"}


def test_an_engine_samples_by_cloud_alone(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    agent = new_agent(new_cloud(same_vocabulary(folder)), model=str(folder))
    warm = Sampling(0.8)
    with pytest.raises(InvalidInput, match=r"arm verify of big in the cloud is greedy, temperature is 0.8"):
        said(agent, "verify", sampling=warm)
    for arm in ("cloud", "auto"):
        ids, summary = said(agent, arm, sampling=warm)
        assert ids == counted() and summary.arm == "cloud"
    assert said(agent, "verify")[0] == counted()


def test_log_probabilities_of_an_engine(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    agent = new_agent(new_cloud(same_vocabulary(folder)), model=str(folder))
    for arm in ("cloud", "verify"):
        *made, _ = agent.generate(GenerationRequest(PROMPT, 4, arm, top_logprobs=2))  # type: ignore[arg-type]
        tokens = [token for token in made if isinstance(token, Token)]
        assert [token.logprob for token in tokens] == [-0.25] * 4 and {len(token.top) for token in tokens} == {2}


@pytest.fixture
def foreign(new_cloud: Any, new_agent: NewAgent, folder: Path) -> tuple[FakeCloud, LanguageAgent]:
    """A cloud of another vocabulary than the device's model."""
    cloud = new_cloud(BIG, tokenizers=[RAW])
    return cloud, new_agent(cloud, model=str(folder), wait_s=0.1)


def test_with_another_vocabulary_each_side_gives_whole_answers(foreign: tuple[FakeCloud, LanguageAgent]) -> None:
    cloud, agent = foreign
    assert agent.arms() == ("auto", "edge", "cloud")
    own, theirs = agent.tokenizer_for("edge"), agent.tokenizer_for("cloud")
    assert own.vocabulary != theirs.vocabulary == agent.tokenizer.vocabulary == BYTES.vocabulary
    ids, summary = said(agent)
    assert ids == counted() and (summary.arm, summary.why) == ("cloud", "tiny on the device has another vocabulary")
    with pytest.raises(InvalidInput, match="drafts in the vocabulary of big in the cloud, tiny .* --draft lookup"):
        said(agent, "verify")
    alone, summary = said(agent, "edge")
    assert summary.arm == "edge" and len(cloud.openings) == 1
    cloud.stop()
    with pytest.raises(LinkDown):
        said(agent, "cloud")
    assert agent.tokenizer.vocabulary == own.vocabulary
    again, summary = said(agent)
    assert again == alone and (summary.arm, summary.why, summary.degraded) == ("edge", "no cloud answers", True)


def test_a_loss_that_shows_at_the_first_token_leaves_auto_to_the_device(
    foreign: tuple[FakeCloud, LanguageAgent],
) -> None:
    """The prompt is encoded again, in the device's vocabulary, and nobody waits."""
    cloud, agent = foreign
    alone = agent.answer("AB", arm="edge", max_tokens=5)
    first = agent.answer("AB", max_tokens=5)
    assert first.summary is not None and first.summary.arm == "cloud" and first.text != alone.text
    cloud.stop()
    answer = agent.answer("AB", max_tokens=5)
    assert answer.text == alone.text and answer.summary is not None
    assert (answer.summary.arm, answer.summary.degraded) == ("edge", True)


def test_a_loss_later_on_is_waited_for(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    cloud = new_cloud(BIG, tokenizers=[RAW])
    pieces = iter(new_agent(cloud, model=str(folder), wait_s=0.1).stream("AB"))
    assert next(pieces) == "^"
    cloud.stop()
    with pytest.raises(LinkDown, match="no cloud answered"):
        list(pieces)


def test_ids_of_another_tokenizer_are_never_read_as_its_own(foreign: tuple[FakeCloud, LanguageAgent]) -> None:
    _, agent = foreign
    own = agent.tokenizer_for("edge").vocabulary
    assert said(agent, vocabulary=own)[1].arm == "edge"
    for arm, vocabulary in (("edge", BYTES.vocabulary), ("cloud", own), ("auto", b"?" * 32)):
        with pytest.raises(InvalidInput, match="encoded by another tokenizer than arm (edge|cloud) has now"):
            said(agent, arm, vocabulary=vocabulary)


def test_lookup_drafts_need_no_vocabulary_of_the_devices(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    agent = new_agent(new_cloud(BIG, tokenizers=[RAW]), model=str(folder), draft="lookup")
    assert agent.arms() == ("auto", "edge", "cloud", "verify") and said(agent, "verify")[0] == counted()


# --- clouds that come and change


def test_a_device_starts_alone_and_is_joined(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    port = free_port()
    agent = new_agent(f"127.0.0.1:{port}", model=str(folder), connect_s=0.0)
    assert said(agent, "verify")[1].degraded
    cloud = new_cloud(same_vocabulary(folder), port=port)
    agent.replicas.wait_model(threading.Event())
    agent.replicas.wait(threading.Event())
    assert said(agent, "verify")[0] == counted() and cloud.openings[0].model == b"big     "


def test_a_cloud_that_is_replaced_is_found_at_the_next_prompt(new_cloud: Any, new_agent: NewAgent) -> None:
    """Both models have one tokenizer, so the prompt is still good."""
    cloud = new_cloud(BIG, tokenizers=[RAW])
    agent = new_agent(cloud)
    assert said(agent)[0] == counted()
    cloud.models = (model_info(BYTES, "newer"),)
    assert said(agent)[0] == counted()
    assert (agent.name, [opening.model for opening in cloud.openings]) == ("newer", [b"big     ", b"newer   "])


def test_an_answer_is_never_of_two_models(new_cloud: Any, new_agent: NewAgent) -> None:
    cloud = new_cloud(BIG, tokenizers=[RAW])
    agent = new_agent(cloud, wait_s=0.5)
    events = agent.generate(GenerationRequest(PROMPT, 400, "cloud"))
    assert isinstance(first := next(events), Token) and first.id == counted()[0]
    cloud.stop()
    new_cloud(model_info(BYTES, "newer"), tokenizers=[RAW], port=cloud.port)
    with pytest.raises(LinkDown, match="now holds newer, which cannot go on with this answer"):
        list(events)
    assert said(agent)[0] == counted()


def test_two_replicas_are_updated_one_after_the_other(new_cloud: Any, new_agent: NewAgent) -> None:
    newer = model_info(BYTES, "newer")
    clouds = [new_cloud(BIG, tokenizers=[RAW]) for _ in range(2)]
    agent = new_agent(*clouds)
    for cloud in clouds:
        cloud.stop()
        new_cloud(newer, tokenizers=[RAW], port=cloud.port)
        assert said(agent)[0] == counted()
    assert agent.name == "newer"


def test_a_model_of_another_vocabulary_may_replace_one(new_cloud: Any, new_agent: NewAgent, folder: Path) -> None:
    cloud = new_cloud(same_vocabulary(folder, name="former"))
    agent = new_agent(cloud, model=str(folder), wait_s=1.0)
    assert said(agent, "verify")[0] == counted()
    cloud.models, cloud.tokenizers = (BIG,), [RAW]
    assert said(agent, "verify")[1].degraded, "it was encoded for the former, which is gone"
    until(lambda: agent.cloud_name == "big")
    assert said(agent, "cloud")[0] == counted() and agent.tokenizer.vocabulary == BYTES.vocabulary


def test_an_engine_that_is_not_there_yet_is_waited_for(new_cloud: Any, new_agent: NewAgent) -> None:
    """The service lists no model until its engine answers."""
    cloud = new_cloud(tokenizers=[RAW])
    agent = new_agent(cloud)
    with pytest.raises(PeerError, match="the cloud holds no language model$"):
        said(agent)
    cloud.models = (replace(BIG, compared=2000, mismatched=1),)
    until(lambda: agent.ready)
    assert said(agent)[0] == counted()
