"""`verify` gives token for token what `cloud` gives, whatever is drafted and however many ask at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge_agent.language import scoring
from isthmus.edge_agent.language.arms.verify import SpeculationStats
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import GREEDY, Sampling
from tests.bench.lossless import MODELS, SCRIPTED, Bench, Case
from tests.bench.processes import CloudProcess
from tests.bench.prompts import stubborn
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import CHATTER, Answer, language_agent, prompt_of, until

TOKENS = 48
TEXTS = ("What is a bridge?", "one two three one two three one two", "x", "The sea, " * 20)
STEP_BYTES = 2 * 2 * 2 * 256 * 16 * 4  # of a session's state: layers, k and v, kv_heads, tokens, head_dim, float32
BUDGET_BYTES = 1 << 20

NewBench = Callable[[Sampling], Bench]


@pytest.fixture(scope="module")
def cloud(tiny_llama: Path) -> Iterator[CloudProcess]:
    arguments = ("--model", str(tiny_llama), *LANGUAGE, "--share-prefixes", "peer")  # a stranger's text is read anew
    with CloudProcess(arguments=arguments) as process:
        yield process


@pytest.fixture
def new_bench(cloud: CloudProcess, tiny_llama: Path) -> Iterator[NewBench]:
    opened: list[Bench] = []

    def build(sampling: Sampling) -> Bench:
        opened.append(Bench(Checkpoint.open(tiny_llama), cloud.target, TOKENS, sampling))
        opened[-1].tempos = {name: stubborn() for name in MODELS}
        return opened[-1]

    yield build
    for bench in opened:
        bench.replicas.close()


def prompts(bench: Bench) -> list[tuple[int, ...]]:
    return [tuple(bench.checkpoint.tokenizer.encode(text)) for text in TEXTS]


@pytest.mark.parametrize("sampling", [GREEDY, CHATTER], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["model-4bit", "model-8bit", "lookup", *SCRIPTED])
def test_verify_is_cloud_alone(new_bench: NewBench, draft: str, sampling: Sampling) -> None:
    bench = new_bench(sampling)
    cases = [bench.case(index, prompt, draft, True) for index, prompt in enumerate(prompts(bench))]
    assert [case.mismatches for case in cases] == [0] * len(TEXTS)
    assert sum(case.tokens for case in cases) > TOKENS, "answers that are all cut short prove little"
    check_drafts(draft, cases)


@pytest.mark.parametrize("sampling", [GREEDY, CHATTER], ids=["greedy", "sampled"])
def test_verify_is_cloud_with_six_at_once(new_bench: NewBench, sampling: Sampling) -> None:
    """Rows of several sessions share passes, with drafts of every kind."""
    bench = new_bench(sampling)
    drafts = (*MODELS, "lookup", *SCRIPTED)
    jobs = [(index, prompt, name, False) for index, prompt in enumerate(prompts(bench)) for name in drafts]
    with ThreadPoolExecutor(6) as threads:
        cases = list(threads.map(lambda job: bench.case(*job), jobs))
    assert sum(case.mismatches for case in cases) == 0
    for name in drafts:
        check_drafts(name, [case for case in cases if case.draft == name])


def test_a_prompt_has_the_log_probabilities_of_the_answer_that_it_was(
    cloud: CloudProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in parts, and again from what the cloud still holds; after a restart from the beginning."""
    monkeypatch.setattr(scoring, "MAX_SCORED", 20)
    with language_agent(None, cloud.target) as agent:
        prompt = prompt_of(agent, TEXTS[0])
        request = GenerationRequest(prompt, TOKENS, "cloud", top_logprobs=2)
        answer = [event for event in agent.generate(request) if isinstance(event, Token)]
        whole = replace(request, prompt=(*prompt, *(token.id for token in answer)))
        scored = agent.score(whole)
        assert [token.id for token in scored] == list(whole.prompt)
        assert [replace(token, source="cloud") for token in scored[len(prompt) :]] == answer
        assert (scored[0].logprob, len(scored[1].top)) == (None, 2)
        cloud.kill()
        cloud.start()
        until(lambda: agent.replicas.best() is not None)
        assert agent.score(replace(whole, arm="auto")) == scored


def check_drafts(draft: str, cases: list[Case]) -> None:
    """The drafts were sent, judged, and cheap."""
    accepted, rejected = sum(case.accepted for case in cases), sum(case.rejected for case in cases)
    if draft in ("wrong", "end-of-text", "random"):
        assert rejected > 0 and accepted < rejected / 8
    elif draft == "right":
        assert rejected == 0 and accepted >= 0.9 * sum(case.tokens - 1 for case in cases)
        assert sum(case.passes for case in cases) < 0.5 * sum(case.tokens for case in cases)
    elif draft != "lookup":
        assert accepted > 0
    if draft != "lookup":  # there the cloud decodes by itself, many tokens a round
        assert all(case.round_bytes / case.rounds <= 200 for case in cases)


def test_the_agents_own_arms_agree(cloud: CloudProcess, tiny_llama: Path) -> None:
    """Not a draft of a bench but LanguageAgent as it ships, with whatever it decides about drafting."""
    with (
        language_agent(tiny_llama, cloud.target) as agent,
        language_agent(tiny_llama, cloud.target, draft="lookup") as lookup,
    ):
        for text in TEXTS:
            for sampling in (GREEDY, CHATTER):
                expected = Answer(agent, prompt_of(agent, text), TOKENS, "cloud", sampling)
                assert Answer(agent, prompt_of(agent, text), TOKENS, "verify", sampling).ids == expected.ids
                assert Answer(lookup, prompt_of(agent, text), TOKENS, "verify", sampling).ids == expected.ids


def test_a_round_is_at_most_200_bytes(new_bench: NewBench) -> None:
    """By the agent's own count, with every draft of 16 tokens sent, and log probabilities off."""
    bench = new_bench(CHATTER)
    rows = [bench.case(index, prompt, "right", True) for index, prompt in enumerate(prompts(bench))]
    drafted = sum(case.accepted for case in rows) / sum(case.rounds for case in rows)
    assert drafted > 4, "rounds that carry next to nothing prove nothing"
    assert sum(case.round_bytes for case in rows) / sum(case.rounds for case in rows) <= 200


def test_a_second_turn_finds_its_state(cloud: CloudProcess, tiny_llama: Path) -> None:
    with language_agent(tiny_llama, cloud.target) as agent:
        first = prompt_of(agent, "A question of some length, please.")
        answer = Answer(agent, first, TOKENS, "cloud", CHATTER)
        second = (*first, *answer.ids, *prompt_of(agent, " And another question."))
        again = Answer(agent, second, TOKENS, "cloud", CHATTER)
    with language_agent(tiny_llama, cloud.target) as stranger:
        fresh = Answer(stranger, second, TOKENS, "cloud", CHATTER)
    assert answer.how.cached == fresh.how.cached == 0
    assert len(first) <= again.how.cached < len(second)
    assert again.ids == fresh.ids
    assert again.how.opening_bytes < fresh.how.opening_bytes
    assert again.how.prefill_passes < fresh.how.prefill_passes


def test_sessions_that_push_each_other_out(cloud: CloudProcess, tiny_llama: Path) -> None:
    """32 sessions where 8 short ones, or 4 long ones, have room: all end with the right tokens, within the budget."""
    sizes = [20 + 11 * index for index in range(32)]
    arguments = ("--model", str(tiny_llama), *LANGUAGE, "--context-mb", str(BUDGET_BYTES >> 20))
    with CloudProcess(arguments=arguments) as small:
        benches = [Bench(Checkpoint.open(tiny_llama), place.target, TOKENS, CHATTER) for place in (cloud, small)]
        texts = [tuple(3 + (7 * size + step) * step % 256 for step in range(size)) for size in sizes]
        before = cloud.metric("decoder_rows_total", kind="used")
        expected = [benches[0].answer(text, None, SpeculationStats())[0] for text in texts]
        enough = cloud.metric("decoder_rows_total", kind="used") - before
        seen: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                seen.append(small.metric("contexts_bytes"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(32) as threads:
                found = list(threads.map(lambda text: benches[1].answer(text, None, SpeculationStats())[0], texts))
        finally:
            done.set()
            watcher.join()
            for bench in benches:
                bench.replicas.close()
        assert found == expected
        assert small.metric("context_evictions_total", reason="budget") > 0
        assert small.metric("decoder_rows_total", kind="used") < 5 * enough, "it reads texts again for a token each"
        assert max(seen) <= BUDGET_BYTES and max(seen) > BUDGET_BYTES - 3 * STEP_BYTES
        assert small.metric("tokens_committed_total") == sum(map(len, expected))
