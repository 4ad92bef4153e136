"""Measure a handoff bundle's parts: confidence heads with thresholds, operating points, and scores on test prompts.

device outputs --confidence heads--> thresholds --> offloaded tokens --coded states, upper layers--> points, scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isthmus.models.bundle.manifest import Interval
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import StatePoint, StateRate, Threshold, least_likely
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.confidence_head import confidences, decide, head_tensors, train_confidence_head
from isthmus.models.recipes.language.device_outputs import DeviceOutputs, Tensors
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.suffix import ApproximateKV, CodedStates, run_suffix
from isthmus.models.recipes.language.teacher import TeacherOutputs

HEAD_SHARE = 0.6  # of the held-out tokens train confidence heads; the others measure thresholds
THRESHOLDS = tuple(round(0.5 + step / 100, 2) for step in range(50))
TEST_THRESHOLDS = (0.8, 0.9, 0.95, 0.97)
TARGET_AGREEMENT = 0.97  # of the tokens decoded from exits, where points and scores are measured
RATE_STEPS = 5  # by which the rate of other hidden states may be below that of offloaded tokens

Scores = dict[str, Interval]


@dataclass(frozen=True)
class ExitConfidence:
    """A confidence head for each exit; agreement of each exit's choice and thresholds, on tokens that no head saw."""

    heads: list[nn.Sequential]
    agreements: list[float]
    thresholds: list[Threshold]

    def predict(self, outputs: DeviceOutputs) -> Tensor:
        """How likely each exit's choice is right (E, N)."""
        pairs = zip(self.heads, outputs.features_ENF, strict=True)
        return torch.stack([confidences(head, features_NF) for head, features_NF in pairs])

    def offloaded(self, outputs: DeviceOutputs) -> Tensor:
        """For each position (N,) whether the next token belongs to an answer and no exit is confident of it."""
        threshold = least_likely(self.thresholds, TARGET_AGREEMENT)
        decisions = decide(self.predict(outputs), outputs.right_EN, threshold)
        return outputs.answer_N & ~decisions.sure_N


def train_exit_confidence(exits: Mapping[int, Tensors], held_out: DeviceOutputs, seed: int) -> ExitConfidence:
    """Train confidence heads, add them to the tensors of their exits (depth -> tensors), and measure thresholds."""
    chosen_N = torch.rand(held_out.right_EN.shape[1], generator=torch.Generator().manual_seed(seed)) < HEAD_SHARE
    heads = []
    for (depth, tensors), features_NF, right_N in zip(
        exits.items(), held_out.features_ENF, held_out.right_EN, strict=True
    ):
        heads.append(train_confidence_head(features_NF[chosen_N], right_N[chosen_N], seed + depth))
        tensors.update(head_tensors(heads[-1]))
    right_EN = held_out.right_EN[:, ~chosen_N]
    found = ExitConfidence(heads, right_EN.float().mean(1).tolist(), [])
    confidence_EN = found.predict(held_out)[:, ~chosen_N]
    return replace(found, thresholds=[threshold_at(each, confidence_EN, right_EN) for each in THRESHOLDS])


def threshold_at(confidence: float, confidence_EN: Tensor, right_EN: Tensor) -> Threshold:
    """A threshold with its measured coverage and agreement."""
    decisions = decide(confidence_EN, right_EN, confidence)
    return Threshold(confidence=confidence, coverage=decisions.coverage, agreement=decisions.agreement)


def score_exits(confidence: ExitConfidence, test: DeviceOutputs) -> Scores:
    """Coverage and agreement of the exits on answers to the test prompts, at some thresholds."""
    confidence_EN, right_EN = confidence.predict(test)[:, test.answer_N], test.right_EN[:, test.answer_N]
    scores = {}
    for index, right_N in enumerate(right_EN):
        scores[f"test exit{index} agreement"] = interval(right_N.numpy())
    for threshold in TEST_THRESHOLDS:
        decisions = decide(confidence_EN, right_EN, threshold)
        scores[f"test coverage from {threshold:g}"] = interval(decisions.sure_N.numpy())
        if decisions.sure_N.any():
            scores[f"test agreement from {threshold:g}"] = interval(decisions.right_N[decisions.sure_N].numpy())
    return scores


def measure_points(
    model: Llama, outputs: DeviceOutputs, offloaded_N: Tensor, depth: int, codec: StateCodec
) -> tuple[list[StateRate], list[StatePoint]]:
    """The size of hidden states at each rate, and the operating points on the Pareto front of size and agreement."""
    full_N = outputs.teacher.top_NK[:, 0]
    coded = CodedStates(model, outputs.teacher, depth, codec)
    pairs = [(low, high) for high in codec.rates for low in range(max(high - RATE_STEPS, 0), high + 1)]
    points = []
    for low, high in pairs:
        teacher, mean_bytes = coded.at_rates(low, high, offloaded_N)
        right_N = run_suffix(model, teacher, depth).chosen_N == full_N
        agreement = float(right_N[offloaded_N].float().mean())
        points.append(StatePoint(context_rate=low, rate=high, mean_bytes=mean_bytes, agreement=agreement))
    sizes = [coded.at_rate(rate)[1] for rate in codec.rates]
    rates = [StateRate(mean_bytes=float(bytes_N.mean()), max_bytes=int(bytes_N.max())) for bytes_N in sizes]
    return rates, pareto_front(points)


def pareto_front(points: Sequence[StatePoint]) -> list[StatePoint]:
    """Points by rising size, without those whose agreement a smaller one reaches."""
    front, best = [], 0.0
    for point in sorted(points, key=lambda point: point.mean_bytes):
        if point.agreement > best:
            front.append(point)
            best = point.agreement
    return front


def score_suffix(
    model: Llama,
    test: DeviceOutputs,
    offloaded_N: Tensor,
    coded: CodedStates,
    points: Sequence[StatePoint],
    approximate: ApproximateKV,
) -> Scores:
    """Agreement of the upper layers on answers to the test prompts.

    For all tokens of answers, with uncoded hidden states and exact or approximate KV. For offloaded tokens, with
    uncoded hidden states and at each point.
    """
    full_N = test.teacher.top_NK[:, 0]

    def score(teacher: TeacherOutputs, chosen_N: Tensor, approximate: ApproximateKV | None = None) -> Interval:
        outputs = run_suffix(model, teacher, coded.depth, approximate)
        return interval((outputs.chosen_N == full_N)[chosen_N].numpy())

    prompts_only = replace(approximate, prompts_only=True)
    return {
        "test rows agreement": score(test.teacher, test.answer_N),
        "test fill agreement": score(test.teacher, test.answer_N, approximate),
        "test fill of prompts agreement": score(test.teacher, test.answer_N, prompts_only),
        "test asked rows agreement": score(test.teacher, offloaded_N),
        **{
            f"test point{index} agreement": score(
                coded.at_rates(point.context_rate, point.rate, offloaded_N)[0], offloaded_N
            )
            for index, point in enumerate(points)
        },
    }
