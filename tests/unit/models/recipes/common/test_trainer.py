from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run, Schedule, follow, learning_rate

SCHEDULE = Schedule(epochs=4, steps=3, peak_lr=0.05)


class Toy(nn.Module):
    """Everything that can carry state from step to step: weights, running statistics, dropout's randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x_B4: Tensor) -> Tensor:
        y_B1: Tensor = self.layers(x_B4)
        return y_B1


def toy() -> Toy:
    torch.manual_seed(1)
    return Toy()


def batches(epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(SCHEDULE.steps):
        yield torch.rand(16, 4, generator=generator)


def loss_of(module: Toy) -> Callable[[Tensor], tuple[Tensor, dict[str, float]]]:
    def loss(x_B4: Tensor) -> tuple[Tensor, dict[str, float]]:
        error = ((module(x_B4) - x_B4.sum(1, keepdim=True)) ** 2).mean()
        return error, {"error": error.item()}

    return loss


def interrupted_in(epoch: int) -> Callable[[int, torch.Generator], Iterator[Tensor]]:
    """Batches that end with the user's Ctrl-C, one step into `epoch`."""

    def broken(now: int, generator: torch.Generator) -> Iterator[Tensor]:
        for index, batch in enumerate(batches(now, generator)):
            if now == epoch and index == 1:
                raise KeyboardInterrupt
            yield batch

    return broken


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, epoch: int) -> None:
    unbroken, broken, resumed = toy(), toy(), toy()
    average = Run(tmp_path / "whole", 0).fit("toy", unbroken, batches, loss_of(unbroken), SCHEDULE)
    run = Run(tmp_path / "parts", 0)
    with pytest.raises(KeyboardInterrupt):
        run.fit("toy", broken, interrupted_in(epoch), loss_of(broken), SCHEDULE)
    torch.rand(7)  # the new process is not where the old one's randomness ended
    again = run.fit("toy", resumed, batches, loss_of(resumed), SCHEDULE)
    assert same(resumed, unbroken)
    assert same(again, average)
    assert not same(broken, unbroken)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    run, first, second = Run(tmp_path, 0), toy(), toy()
    average = run.fit("toy", first, batches, loss_of(first), SCHEDULE)
    assert same(run.fit("toy", second, interrupted_in(0), loss_of(second), SCHEDULE), average)


def test_a_checkpoint_cut_off_while_written_harms_nothing(tmp_path: Path) -> None:
    run, module = Run(tmp_path, 0), toy()
    average = run.fit("toy", module, batches, loss_of(module), SCHEDULE)
    (tmp_path / "toy.part").write_bytes(b"half a check")
    assert same(run.fit("toy", toy(), interrupted_in(0), loss_of(toy()), SCHEDULE), average)


def test_a_crash_while_a_checkpoint_is_written_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, resumed = Run(tmp_path, 0), toy(), toy()
    with pytest.raises(KeyboardInterrupt):
        run.fit("toy", module, interrupted_in(2), loss_of(module), SCHEDULE)
    before = (tmp_path / "toy.ckpt").read_bytes()

    def half(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        run.fit("toy", resumed, batches, loss_of(resumed), SCHEDULE)
    assert (tmp_path / "toy.ckpt").read_bytes() == before


def test_another_seed_trains_another_network(tmp_path: Path) -> None:
    first, second = toy(), toy()
    Run(tmp_path / "0", 0).fit("toy", first, batches, loss_of(first), SCHEDULE)
    Run(tmp_path / "1", 1).fit("toy", second, batches, loss_of(second), SCHEDULE)
    assert not same(first, second)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    module = toy()
    Run(tmp_path, 0).fit("toy", module, batches, loss_of(module), SCHEDULE)
    with pytest.raises(InvalidInput, match="made with seed 0, this run has seed 1"):
        Run(tmp_path, 1).fit("toy", module, batches, loss_of(module), SCHEDULE)


def test_every_origin_has_a_folder_of_its_own(tmp_path: Path) -> None:
    runs = [Run(tmp_path, seed, apart=True).of(model=model) for seed in (0, 1) for model in ("a", "b")]
    assert len({run.folder for run in runs}) == 4 and {run.folder.parent for run in runs} == {tmp_path}
    assert Run(tmp_path, 0, apart=True).of(model="a").folder == runs[0].folder


def test_a_folder_is_of_one_origin(tmp_path: Path) -> None:
    run = Run(tmp_path, 0).of(model="a", cuts="first")
    run.fit("toy", module := toy(), batches, loss_of(module), SCHEDULE)
    assert Run(tmp_path, 0).of(cuts="first", model="a").folder == tmp_path
    for seed, origin, words in (
        (0, {"model": "b", "cuts": "first"}, "model differ"),
        (0, {"model": "b", "cuts": "last"}, "model, cuts differ"),
        (1, {"model": "a", "cuts": "first"}, "seed differ"),
    ):
        with pytest.raises(InvalidInput, match=words):
            Run(tmp_path, seed).of(**origin)


@pytest.mark.parametrize("text", [None, "", "half a", "[]"])
def test_checkpoints_that_do_not_say_what_they_are_made_from_are_refused(tmp_path: Path, text: str | None) -> None:
    Run(tmp_path, 0).fit("toy", module := toy(), batches, loss_of(module), SCHEDULE)
    if text is not None:
        (tmp_path / "made-from.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"another run \(model, seed differ\): give another --work"):
        Run(tmp_path, 0).of(model="a")


def test_training_learns(tmp_path: Path) -> None:
    module, run = toy(), Run(tmp_path, 0)
    run.fit("toy", module, batches, loss_of(module), Schedule(epochs=12, steps=3, peak_lr=0.05))
    errors = [json.loads(line)["error"] for line in run.log.read_text(encoding="utf-8").splitlines()]
    assert len(errors) == 12
    assert errors[-1] < 0.3 * errors[0]


def test_frozen_parameters_do_not_move(tmp_path: Path) -> None:
    module = toy()
    module.layers[0].requires_grad_(False)
    before = module.layers[0].weight.clone()
    Run(tmp_path, 0).fit("toy", module, batches, loss_of(module), SCHEDULE)
    assert torch.equal(module.layers[0].weight, before)
    assert not torch.equal(module.layers[3].weight, toy().layers[3].weight)


def test_seconds_add_up_over_stages_and_resumed_runs(tmp_path: Path) -> None:
    lines = ['{"stage": "a", "epoch": 0, "seconds": 1.5}', '{"stage": "b", "epoch": 0, "seconds": 2.0}']
    Run(tmp_path, 0).log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert Run(tmp_path, 0).seconds() == 3.5


@pytest.mark.parametrize(
    ("epoch", "fraction"), [(0.0, 0.01), (0.5, 0.5), (1.0, 1.0), (2.5, 0.5), (4.0, 0.0), (9.0, 0.0)]
)
def test_the_learning_rate_rises_in_one_epoch_then_falls_as_a_cosine(epoch: float, fraction: float) -> None:
    assert learning_rate(SCHEDULE, epoch) == pytest.approx(fraction * SCHEDULE.peak_lr)


def test_the_average_follows_and_counters_are_copied() -> None:
    kept, new = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        new.weight.fill_(3.0)
        new.num_batches_tracked.fill_(5)
    follow(kept, new, decay=0.75)
    assert kept.weight.item() == pytest.approx(1.5)
    assert kept.num_batches_tracked.item() == 5
