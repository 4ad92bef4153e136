"""`verify` gives what `cloud` gives under grammars, biases and penalties, and so does `auto` at quality 1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import InvalidInput
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Grammar, Sampling
from tests.bench.processes import CloudProcess
from tests.bench.tiny_llama import write_tiny_llama
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import Answer, language_agent, prompt_of

TOKENS = 60
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "years": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2030}, "maxItems": 3},
        "kind": {"enum": ["bridge", "tunnel", "ferry"]},
        "open": {"type": "boolean"},
    },
    "required": ["name", "years", "kind", "open"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
BIASES = tuple((id_, bias) for id_, bias in zip(range(3, 250, 17), (3.1, -4.7, 100.0, -100.0, 0.3) * 3, strict=False))
SAMPLINGS = {
    "grammar": Sampling(grammar=JSON),
    "grammar, sampled": Sampling(0.9, 0.95, 5, grammar=JSON),
    "regex": Sampling(grammar=Grammar("regex", "(yes|no), because [a-z ]{5,40}[.]")),
    "penalties": Sampling(frequency_penalty=0.7, presence_penalty=-0.3),
    "biases, penalties, sampled": Sampling(0.8, 1.0, 9, BIASES, 1.3, 0.9),
    "all of it": Sampling(0.7, 0.9, 3, BIASES, -0.5, 1.1, JSON),
}
TEXTS = ("What is a bridge?", "one two three one two three one two", "{")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's vocabulary, whose tokens a text has many of, and random weights."""
    return write_tiny_llama(tmp_path_factory.mktemp("masks") / "tiny", vocab="smollm2")


@pytest.fixture(scope="module")
def cloud(model: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(model), *LANGUAGE)) as process:
        yield process


@pytest.fixture(scope="module")
def agent(model: Path, cloud: CloudProcess) -> Iterator[LanguageAgent]:
    with language_agent(model, cloud.target, context=512) as agent:
        yield agent


@pytest.fixture(scope="module")
def looking_up(cloud: CloudProcess) -> Iterator[LanguageAgent]:
    """A device without a model, whose drafts are looked up in the text."""
    with language_agent(None, cloud.target, draft="lookup") as agent:
        yield agent


@pytest.mark.parametrize("name", SAMPLINGS)
def test_verify_and_auto_are_cloud_alone(agent: LanguageAgent, looking_up: LanguageAgent, name: str) -> None:
    sampling = SAMPLINGS[name]
    for text in TEXTS:
        prompt = prompt_of(agent, text)
        expected = Answer(agent, prompt, TOKENS, "cloud", sampling)
        assert Answer(agent, prompt, TOKENS, "verify", sampling).ids == expected.ids
        assert Answer(looking_up, prompt, TOKENS, "verify", sampling).ids == expected.ids
        assert Answer(agent, prompt, TOKENS, "auto", sampling, quality=1.0).ids == expected.ids
        check_text(agent, expected, sampling)


def check_text(agent: LanguageAgent, answer: Answer, sampling: Sampling) -> None:
    ids = answer.ids
    if sampling.grammar is None:
        return
    if answer.how.finish == "stop":
        assert agent.tokenizer.special(ids[-1]) and not any(map(agent.tokenizer.special, ids[:-1]))
    if sampling.grammar.kind == "json_schema" and answer.how.finish == "stop":
        assert list(json.loads(agent.tokenizer.decode(ids))) == SCHEMA["required"]


def test_forced_tokens_take_neither_a_step_nor_a_draft(agent: LanguageAgent) -> None:
    sampling, prompt = Sampling(grammar=JSON), prompt_of(agent, "x")
    alone = Answer(agent, prompt, TOKENS, "cloud", sampling)
    chooser = TokenChooser(
        sampling, len(prompt), lambda grammar: agent._grammars.of(agent.tokenizer).state(grammar, [2])
    )
    texts = [[*prompt, *alone.ids[:index]] for index in range(len(alone.ids))]
    forced = sum(chooser.forced(text) is not None for text in texts)
    assert forced > len(alone.ids) / 3
    assert alone.how.passes <= len(alone.ids) - forced + 2


def test_a_local_answer_is_within_its_grammar_too(agent: LanguageAgent) -> None:
    for seed in range(3):
        answer = Answer(agent, prompt_of(agent, "x"), TOKENS, "edge", Sampling(0.9, seed=seed, grammar=JSON))
        check_text(agent, answer, SAMPLINGS["grammar"])
        text = agent.tokenizer.decode(answer.ids)
        assert text.startswith('{"name": "'), text


def test_log_probabilities_are_the_models_own(agent: LanguageAgent) -> None:
    """Before biases, penalties and grammar: what is forced has them too."""
    request = GenerationRequest(prompt_of(agent, "x"), 12, "cloud", Sampling(grammar=JSON), top_logprobs=2)
    tokens = [event for event in agent.generate(request) if not isinstance(event, Summary)]
    assert all(token.logprob is not None and len(token.top) == 2 for token in tokens)
    assert any(token.id not in [id_ for id_, _ in token.top] for token in tokens), "the model prefers other tokens"
    for arm in ("verify", "edge"):
        request = GenerationRequest(request.prompt, 12, arm, request.sampling, top_logprobs=2)  # type: ignore[arg-type]
        again = [event for event in agent.generate(request) if isinstance(event, Token)]
        assert arm == "edge" or [(each.id, each.logprob) for each in again] == [(t.id, t.logprob) for t in tokens]
        assert all(token.logprob is not None for token in again)


@pytest.mark.parametrize("arm", ["edge", "cloud", "verify", "auto"])
def test_a_grammar_that_cannot_be_used_harms_nobody_else(agent: LanguageAgent, arm: Arm) -> None:
    prompt = prompt_of(agent, "x")
    for grammar in (Grammar("regex", "a(b"), Grammar("json_schema", '{"type": "string", "format": "zebra"}')):
        with pytest.raises(InvalidInput, match="grammar cannot be used"):
            Answer(agent, prompt, 5, arm, Sampling(grammar=grammar))
    assert len(Answer(agent, prompt, 5, arm).ids) == 5
    with pytest.raises(InvalidInput, match="logit_bias names token 49152"):
        Answer(agent, prompt, 5, arm, Sampling(logit_bias=((49_152, 1.0),)))
