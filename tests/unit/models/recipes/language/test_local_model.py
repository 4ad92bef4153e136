"""Local models: what their confidence heads learn from, and what offloading to the cloud is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import FEATURES, ConfidenceHead, ngram_repeats
from isthmus.models.language.handoff.manifest import LocalModelEntry
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.local_model import answer_features, local_models, offload_levels
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher
from tests.bench.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2))


@pytest.fixture(scope="module")
def teacher(checkpoint: Checkpoint) -> TeacherOutputs:
    rng = np.random.default_rng(0)
    corpus = Corpus.from_sequences([(rng.integers(3, 259, 30).tolist(), 10 if index % 3 else 30) for index in range(9)])
    return run_teacher(Llama.load(checkpoint, torch.float32), corpus, ())


@pytest.mark.parametrize("bits", [8, 4])
def test_features_are_of_the_local_models_choices_in_answers(
    checkpoint: Checkpoint, teacher: TeacherOutputs, bits: int
) -> None:
    features_NF, right_N = answer_features(checkpoint, bits, teacher, [1, 2])
    assert features_NF.shape == (40, FEATURES), "20 tokens of either answer, each predicted after the token before it"
    decoder = OnnxDecoder(checkpoint, 64, bits, 1)
    start, end = teacher.bounds(2)
    logits_TV = decoder.extend_all(teacher.ids_N[start:end].tolist())
    expected_T = logits_TV.argmax(1)[9:-1] == teacher.top_NK[start + 9 : end - 1, 0].numpy()
    np.testing.assert_array_equal(right_N[20:].numpy(), expected_T)
    log_V = torch.from_numpy(logits_TV[9]).log_softmax(0)
    np.testing.assert_allclose(features_NF[20, :2], log_V.topk(2).values, rtol=1e-3)
    text = teacher.ids_N[start : start + 10].tolist()
    assert features_NF[20, -3:].tolist() == ngram_repeats(text, int(log_V.argmax())), (
        "the text up to the token before the choice"
    )


def test_fewer_bits_are_right_less_often(checkpoint: Checkpoint, teacher: TeacherOutputs) -> None:
    eight, four = (answer_features(checkpoint, bits, teacher, [1, 2, 4, 5, 7, 8])[1].float().mean() for bits in (8, 4))
    assert eight > four


def test_entries_and_files_belong_together(checkpoint: Checkpoint, teacher: TeacherOutputs) -> None:
    entries, files = local_models(checkpoint, teacher, 0)
    found = [LocalModelEntry.model_validate(entry) for entry in entries]
    assert [entry.bits for entry in found] == [8, 4]
    for entry in found:
        head = ConfidenceHead.from_tensors(files[entry.judge])
        assert 0 <= head(np.random.default_rng(0).normal(size=259).astype(np.float32), [7]) <= 1
        rates = [level.asked for level in entry.levels]
        assert rates == sorted(rates) and rates[0] == 0


def test_levels_promise_the_upper_end_of_an_interval() -> None:
    confidence_N = torch.linspace(0.5, 1, 2001)
    right_N = torch.rand(2001, generator=torch.Generator().manual_seed(0)) < confidence_N
    found = offload_levels(confidence_N, right_N)
    assert found[0] == {"likely": 0.0, "asked": 0.0, "wrong": interval(~right_N.numpy()).high}
    half = next(level for level in found if level["asked"] > 0.49)
    assert half["asked"] == pytest.approx(0.5, abs=0.01)
    exact = ((confidence_N >= half["likely"]) & ~right_N).float().mean().item()
    assert exact < half["wrong"] < exact + 0.03
    assert [level["wrong"] for level in found] == sorted((level["wrong"] for level in found), reverse=True)


def test_equal_confidences_are_one_level() -> None:
    found = offload_levels(torch.full((100,), 0.9), torch.ones(100, dtype=torch.bool))
    assert [level["likely"] for level in found] == [0.0, pytest.approx(0.9)]
    assert found[1]["asked"] == 0 and 0 < found[1]["wrong"] < 0.05, "a hundred right tokens promise little"
