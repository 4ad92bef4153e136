"""Thresholds, operating points and scores, from device outputs whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import StatePoint, Threshold
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.device_outputs import DeviceOutputs
from isthmus.models.recipes.language.hidden_states import fit_states, inputs_at
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.scores import (
    HEAD_SHARE,
    ExitConfidence,
    measure_points,
    pareto_front,
    score_exits,
    score_suffix,
    train_exit_confidence,
)
from isthmus.models.recipes.language.suffix import ApproximateKV, CodedStates
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher
from tests.bench.tiny_llama import write_tiny_llama

TOKENS = 6000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="module")
def teacher(model: Llama) -> TeacherOutputs:
    rng = np.random.default_rng(0)
    corpus = Corpus.from_sequences([(rng.integers(3, 259, 30).tolist(), 10) for _ in range(6)])
    return run_teacher(model, corpus, (1,), torch.float32)


def outputs(features_ENF: Tensor, right_EN: Tensor, answer_N: Tensor, teacher: TeacherOutputs) -> DeviceOutputs:
    return DeviceOutputs(features_ENF, right_EN, torch.zeros(right_EN.shape), answer_N, teacher)


def chance(seed: int, teacher: TeacherOutputs) -> DeviceOutputs:
    """Two exits, whose choices are the more likely right the larger their only feature is."""
    torch.manual_seed(seed)
    features_ENF = torch.randn(2, TOKENS, 1)
    right_EN = torch.rand(2, TOKENS) < torch.sigmoid(2 + 2 * features_ENF[:, :, 0])
    return outputs(features_ENF, right_EN, torch.arange(TOKENS) % 2 == 0, teacher)


def test_heads_are_added_to_exits_and_thresholds_measured_on_other_tokens(teacher: TeacherOutputs) -> None:
    held_out, exits = chance(5, teacher), {1: {"x": np.zeros(1)}, 2: {}}
    found = train_exit_confidence(exits, held_out, 0)
    assert set(exits[1]) == {"x", "judge.0.weight", "judge.0.bias", "judge.2.weight", "judge.2.bias"}
    assert len(exits[2]) == 4 and len(found.heads) == 2
    assert [threshold.confidence for threshold in found.thresholds[:3]] == [0.5, 0.51, 0.52]
    coverage = [threshold.coverage for threshold in found.thresholds]
    assert coverage == sorted(coverage, reverse=True) and coverage[0] > 0.9
    assert found.thresholds[-10].agreement > found.thresholds[0].agreement + 0.05
    trained_on_N = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) < HEAD_SHARE
    assert found.agreements == held_out.right_EN[:, ~trained_on_N].float().mean(1).tolist()


def test_offloaded_tokens_belong_to_answers_and_no_exit_is_confident_of_them(teacher: TeacherOutputs) -> None:
    fitted = train_exit_confidence({1: {}, 2: {}}, chance(5, teacher), 0)
    strict = ExitConfidence(fitted.heads, [], [Threshold(confidence=0.9, coverage=0.5, agreement=0.98)])
    test = chance(1, teacher)
    expected_N = test.answer_N & (strict.predict(test).amax(0) < 0.97)
    assert torch.equal(strict.offloaded(test), expected_N) and 0 < expected_N.sum() < test.answer_N.sum()
    never = ExitConfidence(fitted.heads, [], [Threshold(confidence=0.9, coverage=0.5, agreement=0.5)])
    assert torch.equal(never.offloaded(test), test.answer_N), "no threshold reaches the agreement"


def test_scores_of_exits_are_over_answers_only(teacher: TeacherOutputs) -> None:
    fitted, test = train_exit_confidence({1: {}, 2: {}}, chance(5, teacher), 0), chance(1, teacher)
    scores = score_exits(fitted, test)
    assert scores["test exit1 agreement"].value == pytest.approx(test.right_EN[1, test.answer_N].float().mean().item())
    assert scores["test coverage from 0.8"].samples == int(test.answer_N.sum())
    assert scores["test agreement from 0.97"].value > scores["test agreement from 0.8"].value


def point(mean_bytes: float, agreement: float) -> StatePoint:
    return StatePoint(context_rate=0, rate=0, mean_bytes=mean_bytes, agreement=agreement)


def test_points_that_another_dominates_are_left_out() -> None:
    points = [point(30, 0.9), point(10, 0.8), point(20, 0.7), point(40, 0.9), point(50, 0.95)]
    assert pareto_front(points) == [point(10, 0.8), point(30, 0.9), point(50, 0.95)]
    assert pareto_front([]) == []


def test_points_and_scores_of_the_upper_layers(model: Llama, teacher: TeacherOutputs) -> None:
    positions_N = teacher.later_N.nonzero()[:, 0]
    states_NH = teacher.states[1][positions_N].numpy()
    tensors = fit_states(states_NH, inputs_at(model, teacher, positions_N), np.eye(64, dtype=np.float32), (20, 60))
    codec, offloaded_N = StateCodec(tensors, 64, 2, 1000), torch.arange(teacher.ends[-1]) % 3 == 0
    test = outputs(torch.zeros(1, 180, 1), torch.zeros(1, 180, dtype=torch.bool), torch.arange(180) % 2 == 0, teacher)
    rates, points = measure_points(model, test, offloaded_N, 1, codec)
    assert len(rates) == 2 and rates[0].mean_bytes < rates[1].mean_bytes <= rates[1].max_bytes
    assert [each.mean_bytes for each in points] == sorted(each.mean_bytes for each in points)
    wrong = ApproximateKV(torch.zeros(2, 64, 64), torch.zeros(2, 64))
    scores = score_suffix(model, test, offloaded_N, CodedStates(model, teacher, 1, codec), points, wrong)
    assert scores["test rows agreement"].value == scores["test asked rows agreement"].value == 1
    assert scores["test fill agreement"].value < 1 and scores["test fill of prompts agreement"].value == 1
    assert scores["test rows agreement"].samples == 90 and scores["test point0 agreement"].samples == 60
    assert scores[f"test point{len(points) - 1} agreement"].value == pytest.approx(points[-1].agreement)
