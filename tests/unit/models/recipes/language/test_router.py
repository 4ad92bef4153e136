"""The device's copy beside the full model: what its judge learns from, and what asking the cloud is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import EVIDENCE, Judge, echoes
from isthmus.models.language.handoff.manifest import LocalModelEntry
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.exits import Traces, trace
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.router import answers, copies, levels
from isthmus.models.recipes.language.text import Texts
from tests.bench.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2))


@pytest.fixture(scope="module")
def traces(checkpoint: Checkpoint) -> Traces:
    rng = np.random.default_rng(0)
    texts = Texts.of([(rng.integers(3, 259, 30).tolist(), 10 if index % 3 else 30) for index in range(9)])
    return trace(Llama.load(checkpoint, torch.float32), texts, ())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_judge_sees_the_copys_choices_in_answers(checkpoint: Checkpoint, traces: Traces, bits: int) -> None:
    seen_NF, right_N = answers(checkpoint, bits, traces, [1, 2])
    assert seen_NF.shape == (40, EVIDENCE), "20 tokens of either answer, each decided behind the token before it"
    decoder = OnnxDecoder(checkpoint, 64, bits, 1)
    start, end = traces.bounds(2)
    logits_TV = decoder.extend_all(traces.ids_N[start:end].tolist())
    expected_T = logits_TV.argmax(1)[9:-1] == traces.top_NK[start + 9 : end - 1, 0].numpy()
    np.testing.assert_array_equal(right_N[20:].numpy(), expected_T)
    log_V = torch.from_numpy(logits_TV[9]).log_softmax(0)
    np.testing.assert_allclose(seen_NF[20, :2], log_V.topk(2).values, rtol=1e-3)
    text = traces.ids_N[start : start + 10].tolist()
    assert seen_NF[20, -3:].tolist() == echoes(text, int(log_V.argmax())), "the text up to the token that decides"


def test_a_copy_of_fewer_bits_is_right_less_often(checkpoint: Checkpoint, traces: Traces) -> None:
    eight, four = (answers(checkpoint, bits, traces, [1, 2, 4, 5, 7, 8])[1].float().mean() for bits in (8, 4))
    assert eight > four


def test_entries_and_files_belong_together(checkpoint: Checkpoint, traces: Traces) -> None:
    entries, files = copies(checkpoint, traces, 0)
    found = [LocalModelEntry.model_validate(entry) for entry in entries]
    assert [copy.bits for copy in found] == [8, 4]
    for copy in found:
        judge = Judge.of(files[copy.judge])
        assert 0 <= judge(np.random.default_rng(0).normal(size=259).astype(np.float32), [7]) <= 1
        asked = [level.asked for level in copy.levels]
        assert asked == sorted(asked) and asked[0] == 0


def test_what_levels_promise_is_the_upper_end_of_an_interval() -> None:
    likely_N = torch.linspace(0.5, 1, 2001)
    right_N = torch.rand(2001, generator=torch.Generator().manual_seed(0)) < likely_N
    found = levels(likely_N, right_N)
    assert found[0] == {"likely": 0.0, "asked": 0.0, "wrong": interval(~right_N.numpy()).high}
    half = next(level for level in found if level["asked"] > 0.49)
    assert half["asked"] == pytest.approx(0.5, abs=0.01)
    exact = ((likely_N >= half["likely"]) & ~right_N).float().mean().item()
    assert exact < half["wrong"] < exact + 0.03
    assert [level["wrong"] for level in found] == sorted((level["wrong"] for level in found), reverse=True)


def test_equal_likelihoods_are_one_level() -> None:
    found = levels(torch.full((100,), 0.9), torch.ones(100, dtype=torch.bool))
    assert [level["likely"] for level in found] == [0.0, pytest.approx(0.9)]
    assert found[1]["asked"] == 0 and 0 < found[1]["wrong"] < 0.05, "a hundred right ones promise little"
