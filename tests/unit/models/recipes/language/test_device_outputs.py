"""Texts as a device runs them, against decoder and exits run by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import FEATURES, features
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitWeights, exit_layers, initial_matrix
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.device_outputs import (
    DeviceOutputs,
    Tensors,
    exit_tensors,
    features_after,
    run_device,
)
from isthmus.models.recipes.language.exits import Exit, initialise
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher

DEPTHS = (2, 4)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Llama:
    return Llama.load(checkpoint, torch.float32)


@pytest.fixture(scope="module")
def teacher(model: Llama) -> TeacherOutputs:
    rng = np.random.default_rng(0)
    corpus = Corpus.from_sequences([(rng.integers(3, 259, length).tolist(), length // 2) for length in (12, 9, 20)])
    return run_teacher(model, corpus, (2, 4, 5))


@pytest.fixture(scope="module")
def exits(model: Llama, checkpoint: Checkpoint, teacher: TeacherOutputs) -> dict[int, Tensors]:
    made = {}
    for depth in DEPTHS:
        initialise(exit_ := Exit(model.config, depth, 1), model, teacher)
        made[depth] = exit_tensors(exit_, checkpoint)
    return made


@pytest.fixture(scope="module")
def outputs(checkpoint: Checkpoint, exits: dict[int, Tensors], teacher: TeacherOutputs) -> DeviceOutputs:
    return run_device(checkpoint, exits, teacher, [0, 2])


def test_matrices_are_stored_as_differences(checkpoint: Checkpoint, exits: dict[int, Tensors]) -> None:
    """An exit that was only initialised has the model's last layer, and so no difference."""
    weights = ExitWeights(exits[2], checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(weights.tensor(name), checkpoint.tensor("model.layers.5.mlp.up_proj.weight"), atol=1e-6)
    np.testing.assert_array_equal(initial_matrix(checkpoint, 1, name), weights.tensor(name))
    assert exits[2]["map.bias"].shape == (64,) and "map.weight.codes" in exits[2]


def test_positions_are_those_of_the_sequences(outputs: DeviceOutputs, teacher: TeacherOutputs) -> None:
    assert outputs.features_ENF.shape == (2, 32, FEATURES) and outputs.right_EN.shape == (2, 32)
    assert outputs.teacher.ends == (12, 32) and outputs.teacher.answers == (6, 22)
    assert torch.equal(outputs.teacher.ids_N, torch.cat([teacher.ids_N[:12], teacher.ids_N[21:]]))
    assert outputs.answer_N.nonzero()[:, 0].tolist() == [*range(5, 11), *range(21, 31)]


def test_outputs_are_those_of_decoder_and_exit(
    checkpoint: Checkpoint, exits: dict[int, Tensors], teacher: TeacherOutputs, outputs: DeviceOutputs
) -> None:
    text = teacher.ids_N[21:].tolist()
    decoder = OnnxDecoder(checkpoint, 20, 8, 1, DEPTHS)
    decoder.append(text)
    decoder.advance(0)
    states_TH = decoder.advance(1)
    logits_TV = decoder.logits(exit_layers(ExitWeights(exits[4], checkpoint), 20, 1).run(states_TH))
    right_T = torch.from_numpy(logits_TV.argmax(1)) == teacher.top_NK[21:, 0]
    assert (outputs.right_EN[1, 12:] == right_T).float().mean() > 0.9
    np.testing.assert_allclose(
        outputs.features_ENF[1, 15, :5], features(logits_TV[3], text[:4])[:5], rtol=1e-2, atol=1e-2
    )
    following = torch.from_numpy(logits_TV).log_softmax(1)[range(19), text[1:]]
    torch.testing.assert_close(outputs.next_EN[1, 12:-1], following, rtol=1e-2, atol=1e-2)
    assert outputs.next_EN[1, -1] == 0


def test_hidden_states_are_the_devices_but_for_the_first(
    checkpoint: Checkpoint, teacher: TeacherOutputs, outputs: DeviceOutputs
) -> None:
    own_NH = outputs.teacher.states[4]
    assert list(outputs.teacher.states) == [4]
    for here, there in ((0, 0), (12, 21)):
        assert torch.equal(own_NH[here], teacher.states[4][there].float())
    apart = (own_NH[1:12] - teacher.states[4][1:12].float()).square().mean() / own_NH[1:12].square().mean()
    assert 0 < apart < 0.01


def test_features_are_of_the_text_so_far() -> None:
    logits_NV = np.random.default_rng(0).normal(size=(2, 259)).astype(np.float32)
    found_NF = features_after(logits_NV, [5, 6, 7, 5], 2)
    np.testing.assert_array_equal(found_NF[0], features(logits_NV[0], [5, 6, 7]))
    np.testing.assert_array_equal(found_NF[1], features(logits_NV[1], [5, 6, 7, 5]))
