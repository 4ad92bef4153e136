"""The router recipe: from prompts to a bundle, whatever holds the cloud's model, and what it promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import CloudIdentity
from isthmus.models.recipes.__main__ import main
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import answered, router, router_answers, router_whole
from isthmus.models.recipes.language.router import answer_choices, split
from isthmus.models.recipes.language.router_answers import (
    Answer,
    Ids,
    LocalCloud,
    batches,
    cloud_answers,
    open_cloud,
    read_answers,
    read_prompts,
)
from isthmus.models.recipes.language.router_levels import Choices, mean_interval, report, thresholds, token_levels
from tests.bench.tiny_llama import write_tiny_llama

PROMPTS = 44


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lines = [f"What is {index}?" for index in range(PROMPTS // 2)]
    lines += [json.dumps({"turns": [f"Why is {index}?", "And then?"]}) for index in range(PROMPTS // 2)]
    file.write_text("\n".join(["", *lines, lines[0], "x" * 9000]) + "\n")
    return file


@pytest.fixture(scope="module")
def made(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of the tiny model in 4 bits for itself, and the folder that its run left."""
    out, work = tmp_path_factory.mktemp("made") / "bundle", tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_answers, "ANSWER_TOKENS", 8)
        router.make(out, Run(work, 0), "command", str(folder), 4, str(folder), prompts)
    return out, work


def test_a_bundle_names_both_models_and_certifies_over_prompts(made: tuple[Path, Path], folder: Path) -> None:
    bundle, checkpoint = RouterBundle.open(made[0]), Checkpoint.open(folder)
    manifest, weights = bundle.manifest, checkpoint.fingerprint.hex()
    assert (manifest.device.weights, manifest.device.bits, manifest.name) == (weights, 4, "tiny-4-tiny")
    assert manifest.cloud == CloudIdentity(
        name="tiny", tokenizer=checkpoint.tokenizer.fingerprint.hex(), weights=weights
    )
    assert len(bundle.levels) > 5 and bundle.head is not None
    asked = [level.asked for level in bundle.levels]
    assert asked == sorted(asked) and asked[0] == 0
    assert {level.certificate.prompts for level in bundle.levels} == {PROMPTS - round(0.2 * PROMPTS)}
    assert all(level.wrong.low <= level.wrong.value <= level.certificate.epsilon for level in bundle.levels)
    assert manifest.scores["test device alone"].value == pytest.approx(1 - bundle.levels[0].wrong.value)
    assert "44 prompts, 9 for training" in manifest.training.data and manifest.training.seconds > 0


def test_a_rerun_makes_nothing_again(
    made: tuple[Path, Path], folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(router_answers, "generate", never)
    monkeypatch.setattr(router, "answer_choices", never)
    again = router.make(tmp_path / "again", Run(made[1], 0), "command", str(folder), 4, str(folder), prompts)
    assert again.manifest == RouterBundle.open(made[0]).manifest


def test_prompts_are_plain_lines_or_spec_benchs_each_once(prompts: Path, folder: Path) -> None:
    tokenizer = Checkpoint.open(folder).tokenizer
    found = read_prompts(prompts, tokenizer)
    assert len(found) == PROMPTS and [len(each) for each in found] == sorted(len(each) for each in found)
    assert sum("Why is 3?" in tokenizer.decode(ids) for ids in found) == 1
    assert not any("And then" in tokenizer.decode(ids) for ids in found)


@pytest.mark.parametrize("line", ["{", '{"turns": []}', '{"prompt": "x"}', '{"turns": 1}'])
def test_a_line_that_is_no_prompt_is_named(folder: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f"fine\n{line}\n")
    with pytest.raises(InvalidInput, match=r"bad\.jsonl, line 2"):
        read_prompts(tmp_path / "bad.jsonl", Checkpoint.open(folder).tokenizer)


class Counting:
    """A cloud that answers with the length of the prompt, and is interrupted at some batch."""

    def __init__(self, last: int) -> None:
        self.asked, self._last = list[Ids](), last

    def answers(self, prompts: Sequence[Ids]) -> list[list[int]]:
        if self._last == 0:
            raise KeyboardInterrupt
        self._last -= 1
        self.asked += prompts
        return [[len(prompt)] for prompt in prompts]


def test_an_interrupted_run_goes_on_after_the_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_answers, "MOST_BATCH", 2)
    wanted: list[Ids] = [(1,) * length for length in range(1, 7)]
    first, second = Counting(2), Counting(-1)
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cloud_answers(file, first, wanted)  # type: ignore[arg-type]
    with file.open("a") as lines:
        lines.write('{"prompt": [1, 1')  # and half a line
    found = cloud_answers(file, second, wanted)  # type: ignore[arg-type]
    assert first.asked == wanted[:4] and second.asked == wanted[4:]
    assert [answer.tokens for answer in found] == [(length,) for length in range(1, 7)]


@pytest.mark.parametrize("content", ['{"prompt": 1}', "[1]", '{"prompt": [1], "tokens": ["x"]}', '{"other": [1]}'])
def test_another_file_is_no_cache(tmp_path: Path, content: str) -> None:
    (tmp_path / "answers.jsonl").write_text(content + "}\n" if content == "[1]" else content + "\n")
    with pytest.raises(InvalidInput, match="not the answers of a router recipe"):
        read_answers(tmp_path / "answers.jsonl")


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_answers, "BATCH_TOKENS", 30)
    monkeypatch.setattr(router_answers, "MOST_BATCH", 3)
    found = batches([(0,) * length for length in (2, 2, 2, 2, 20, 40)])
    assert [[len(prompt) for prompt in batch] for batch in found] == [[2, 2, 2], [2], [20], [40]]


def test_models_of_two_vocabularies_route_whole_answers_alone(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (router_answers, router_whole):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 9)
    other, verdicts = write_tiny_llama(tmp_path / "other", vocab="pieces"), cycle([True, False])
    monkeypatch.setattr(answered, "is_acceptable", lambda *answers: next(verdicts))
    made = router.make(tmp_path / "out", Run(tmp_path / "work", 0), "command", str(folder), 8, str(other), prompts)
    bundle, manifest = RouterBundle.open(tmp_path / "out"), made.manifest
    assert bundle.head is None and bundle.verifier is not None and not manifest.token_levels
    assert manifest.answer_levels[0].likely == manifest.query_levels[0].likely == 0
    assert manifest.answer_levels[0].certificate.prompts == PROMPTS // 2
    assert manifest.training.data == "answers of both models to 44 questions, 22 for training"
    (kept,) = (tmp_path / "work").rglob("answered.jsonl")
    assert len(answered.read_answered(kept)) == PROMPTS
    monkeypatch.setattr(LocalCloud, "answers", None)  # a rerun asks nobody
    again = router.make(tmp_path / "out", Run(tmp_path / "work", 0), "command", str(folder), 8, str(other), prompts)
    assert again.manifest.answer_levels == manifest.answer_levels


def test_too_few_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    command = ["router", "--device", str(folder), "--cloud", str(folder), "--prompts", str(tmp_path / "few.txt")]
    paths = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(main, [*command, *paths])
    assert done.exit_code == 1 and "has 2 prompts that fit, at least 40 are needed" in done.stderr


def test_a_cloud_that_is_not_there_is_one_line(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_answers, "CONNECT_S", 0.2)
    monkeypatch.setattr(router_answers, "WAIT_S", 0.3)
    command = ["router", "--device", str(folder), "--cloud", "127.0.0.1:1", "--prompts", str(prompts)]
    paths = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(main, [*command, *paths])
    assert done.exit_code == 1 and done.stderr.startswith("error: no cloud answered") and done.stderr.count("\n") == 1


def test_an_untied_model_can_be_the_cloud(tmp_path: Path) -> None:
    untied = write_tiny_llama(tmp_path / "untied", tied=False)
    with open_cloud(str(untied)) as cloud:
        assert isinstance(cloud, LocalCloud)
        (answer,) = cloud.answers([(5, 6, 7)])
    decoder = OnnxDecoder(Checkpoint.open(untied), 256, 8, 1)
    _, right_N = answer_choices(decoder, Answer((5, 6, 7), tuple(answer)))
    assert right_N.mean() > 0.5, "the device runs the same model in 8 bits"


def test_no_prompt_is_in_both_parts() -> None:
    training, test = split(50, 3)
    assert sorted([*training, *test]) == list(range(50)) and len(training) == 10
    assert test != sorted(test), "in random order, as betting needs it"
    assert split(50, 3) == (training, test) != split(50, 4)


def choices(answers: int, tokens: int, seed: int) -> Choices:
    """Confidences that are true."""
    rng = np.random.default_rng(seed)
    confidence_N = rng.uniform(0.8, 1, answers * tokens)
    return Choices(confidence_N, rng.random(answers * tokens) < confidence_N, np.repeat(np.arange(answers), tokens))


def test_losses_are_shares_of_each_answer() -> None:
    made = Choices(np.array([0.9, 0.5, 0.7]), np.array([False, False, True]), np.array([0, 0, 1]))
    assert made.losses(0).tolist() == [1.0, 0.0] and made.losses(0.6).tolist() == [0.5, 0.0]
    assert made.asked(0.6) == pytest.approx(1 / 3)


def test_levels_keep_what_they_promise_on_other_prompts() -> None:
    likely = thresholds(choices(50, 40, 0).confidence_N)
    levels, fresh = token_levels(likely, choices(200, 40, 1), 0), choices(2000, 40, 2)
    assert likely == sorted(set(likely)) and likely[0] == 0
    for level in levels:
        assert fresh.losses(level.likely).mean() <= level.certificate.epsilon
    assert 0.1 < levels[0].certificate.epsilon < 0.13, "0.1 are wrong"


def test_a_report_says_which_quality_is_kept_or_what_would_be_needed() -> None:
    test = choices(60, 40, 1)
    lines = report(token_levels(thresholds(choices(50, 40, 0).confidence_N), test, 0), test)
    assert lines[0].startswith("quality 0.9: asks ") and "certified at most" in lines[0]
    assert lines[-1].startswith("quality 0.999: not certified")
    assert any("test prompts would be needed, there are 60" in line for line in lines)


def test_an_interval_holds_its_mean() -> None:
    found = mean_interval(np.array([0.0, 0.0, 1.0]), 0)
    assert found.value == pytest.approx(1 / 3) and found.low <= found.value <= found.high and found.samples == 3
