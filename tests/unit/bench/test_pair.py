"""Curves of routers against what is planted, and a quick run of the benchmark on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from isthmus.models.recipes.language import answered, router_answers
from isthmus.models.recipes.language.answer_quality import is_right
from tests.bench import pair
from tests.bench.pair_curves import Outcome, by_answer, figures, measure, roc_auc
from tests.bench.pair_tasks import generated_tasks
from tests.bench.tiny_llama import write_tiny_llama

ONES = np.ones(1000)


def outcomes(seed: int = 0) -> dict[str, Outcome]:
    """A device that is right in half of the cases, a cloud that always is."""
    generator = np.random.default_rng(seed)
    right_P = (generator.random(1000) < 0.5) * 1.0
    scores = {
        "random": generator.random(1000),
        "good": right_P + 0.3 * generator.standard_normal(1000),
        "oracle": right_P,
    }
    return {name: by_answer(score_P, right_P, ONES, 10 * ONES, 5 * ONES) for name, score_P in scores.items()}


def test_figures_of_chance_and_of_an_oracle() -> None:
    chance, best = (figures(outcomes()[name].curve(), "calls") for name in ("random", "oracle"))
    assert chance["apgr"] == pytest.approx(0.5, abs=0.02) and chance["cpt80"] == pytest.approx(0.8, abs=0.04)
    assert best["apgr"] == pytest.approx(0.75, abs=0.02) and best["saved_at_no_loss"] == pytest.approx(0.5, abs=0.05)


def test_intervals_tell_routers_apart() -> None:
    found = measure(outcomes(), (0.9,), 100, "good")
    low, high = found["apgr_above"]["random"]
    assert 0.15 < low < high < 0.3 and found["apgr_above"]["oracle"][1] < 0
    row = found["routers"]["good"]
    assert row["intervals"]["apgr"][0] < row["apgr"] < row["intervals"]["apgr"][1]
    assert row["at"]["0.9"]["calls"] == row["at"]["0.9"]["flops"] < 0.6
    assert row["curve"]["quality"][-1] == 1 and row["curve"]["calls"][0] == 0


def test_a_pair_that_does_not_differ_has_no_figures() -> None:
    alike = by_answer(np.arange(1000.0), ONES, ONES, ONES, ONES)
    row = measure({"one": alike}, (0.9,), 20, "one")["routers"]["one"]
    assert row["apgr"] is None and row["intervals"]["apgr"] is None


def test_roc_auc() -> None:
    positive_N = np.array([True, False, True, False])
    assert roc_auc(np.array([0.9, 0.1, 0.8, 0.3]), positive_N) == 1 and roc_auc(np.zeros(4), positive_N) == 0.5
    assert np.isnan(roc_auc(np.zeros(4), np.ones(4, bool)))


def test_a_span_ends_with_its_sentence_or_its_answer() -> None:
    ends_N = np.array([0, 0, 1, 0, 0, 0, 0, 1], bool)
    answer_N = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    tokens = pair.Tokens(np.zeros((8, 1)), np.ones(8, bool), answer_N, ends_N, np.array([5, 7]))
    asked_N = np.array([0, 1, 0, 1, 0, 1, 0, 0], bool)
    assert pair.spans(asked_N, tokens).tolist() == [False, True, True, True, False, True, True, True]
    confidence_N = np.where(asked_N, 0.1, 0.9)
    outcome = pair.token_outcome(tokens, confidence_N, pair.CloudFlops(None), lambda asked: pair.spans(asked, tokens))
    middle = next(t for t in range(outcome.tokens_PT.shape[1]) if 0 < outcome.tokens_PT[:, t].sum() < 8)
    assert outcome.tokens_PT[:, middle].tolist() == [3, 3] and outcome.calls_PT[:, middle].tolist() == [1, 1]
    assert outcome.flops_PT[:, middle].tolist() == [5 + 3, 7 + 3] and outcome.flops_PT[:, 0].tolist() == [0, 0]


def test_generated_tasks_have_one_right_answer_each() -> None:
    tasks = generated_tasks(20)
    assert len({each.prompt for each in tasks}) == len(tasks) == 80 and tasks == generated_tasks(20)
    assert all(is_right(f"It is {each.references[0]}.", each.references) for each in tasks)
    assert {each.task for each in tasks} == {"arithmetic", "problems", "retrieval", "copy"}


def test_a_quick_run_of_two_vocabularies_and_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((router_answers, "ANSWER_TOKENS"), (pair, "LONGEST_TOKENS")):
        monkeypatch.setattr(module, name, 8)
    verdicts = iter([True, False] * 100)
    monkeypatch.setattr(answered, "is_acceptable", lambda *answers: next(verdicts))
    small, large = write_tiny_llama(tmp_path / "small"), write_tiny_llama(tmp_path / "large", vocab="pieces")
    prompts = tmp_path / "prompts"
    prompts.write_text("\n".join(f"What is {index}?" for index in range(8)))
    for cloud, tokens in ((large, False), (small, True)):
        figures_, work = tmp_path / "pair.json", tmp_path / f"work {cloud.name}"
        command = [
            "--device",
            str(small),
            "--cloud",
            str(cloud),
            "--quick",
            "--work",
            str(work),
            "--json",
            str(figures_),
        ]
        command += ["--prompts", str(prompts), "--bits", "4", "--plot", str(tmp_path / "pair.png")] if tokens else []
        done = CliRunner().invoke(pair.main, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        result = json.loads(figures_.read_text())
        assert result["quality"]["tasks"]["prompts"] == 16 and "task copy" in result["quality"]
        assert set(result["auc_of_acceptable_answers"]) >= {"random", pair.CASCADE, "query (first token)"}
        assert ("tokens" in result["quality"]) == tokens
    row = result["quality"]["tokens"]
    assert (
        0 < row["device_alone"] <= 1 and pair.HEAD in row["routers"] and (tmp_path / "pair.png").stat().st_size > 9000
    )
