"""One training loop for every recipe: warm-up and cosine, moving average of the weights, checkpoint, resume, progress.

Knows nothing about data sets or losses: a recipe passes a function from (epoch, generator) to batches and one from a
batch to a loss. Each epoch's randomness derives from (seed, stage, epoch), so a resumed run equals an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.json_lines import read_lines

ORIGIN = "made-from.json"  # beside the checkpoints

Batches = Callable[[int, torch.Generator], Iterable[Any]]  # one epoch: (epoch, randomness) -> batches
Loss = Callable[[Any], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a stage. `peak_lr` is reached after `warmup_epochs`, then cosine decay to zero."""

    epochs: int
    steps: int  # batches an epoch
    peak_lr: float
    warmup_epochs: float = 1.0
    weight_decay: float = 0.02
    ema_decay: float = 0.995


def learning_rate(schedule: Schedule, epoch: float) -> float:
    """Learning rate at a fractional epoch."""
    if epoch < schedule.warmup_epochs:
        return schedule.peak_lr * max(epoch / schedule.warmup_epochs, 0.01)
    done = (epoch - schedule.warmup_epochs) / max(schedule.epochs - schedule.warmup_epochs, 1e-9)
    return schedule.peak_lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def progress_bar() -> Progress:
    """A bar with epochs, elapsed and remaining time, and the last epoch's metrics."""
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )


@dataclass
class Run:
    """The folder of the stages' checkpoints and log, and the seed that all stages share.

    apart: every origin has a folder of its own, in `folder`.
    """

    folder: Path
    seed: int
    apart: bool = False

    def of(self, **origin: str) -> Run:
        """This run, tied to what it is made from: hashes and options by name. Nothing else resumes from its files.

        Raises InvalidInput when its folder has files of another origin.
        """
        origin = {**origin, "seed": str(self.seed)}
        name = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / name if self.apart else self.folder
        before = read_origin(folder)
        if before is None:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{ORIGIN}.{os.getpid()}"  # several processes may begin one run
            partial.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
            partial.replace(folder / ORIGIN)
        elif others := [key for key in origin if before.get(key) != origin[key]]:
            raise InvalidInput(
                f"{folder} holds checkpoints of another run ({', '.join(others)} differ):"
                " give another --work, or remove that folder"
            )
        return Run(folder, self.seed)

    def fit(self, stage: str, module: nn.Module, batches: Batches, loss_of: Loss, schedule: Schedule) -> nn.Module:
        """Train `module` in place and return the moving average of it, in eval mode.

        Resumes from `folder/<stage>.ckpt` if it exists; an interruption loses at most one epoch.
        Raises InvalidInput when that checkpoint was written with another seed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        trainable = [p for p in module.parameters() if p.requires_grad]
        scales = sorted({getattr(p, "lr_scale", 1.0) for p in trainable})
        groups = [{"params": [p for p in trainable if getattr(p, "lr_scale", 1.0) == scale]} for scale in scales]
        optimizer = torch.optim.AdamW(groups, lr=schedule.peak_lr, weight_decay=schedule.weight_decay)
        average = deepcopy(module).requires_grad_(False)
        checkpoint = self.checkpoint(stage)
        first = self._resume(checkpoint, module, average, optimizer)
        steps = first * schedule.steps
        with progress_bar() as bar:
            task = bar.add_task(stage, total=schedule.epochs, completed=first, figures="")
            for epoch in range(first, schedule.epochs):
                started = time.monotonic()
                torch.manual_seed(zlib.crc32(f"{self.seed}/{stage}/{epoch}".encode()))
                module.train()
                figures: dict[str, list[float]] = {}
                generator = torch.Generator().manual_seed(torch.initial_seed())
                for index, batch in enumerate(batches(epoch, generator)):
                    for group, scale in zip(optimizer.param_groups, scales, strict=True):
                        group["lr"] = scale * learning_rate(schedule, epoch + index / schedule.steps)
                    loss, measured = loss_of(batch)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(trainable, 1.0)
                    optimizer.step()
                    steps += 1
                    follow(average, module, min(schedule.ema_decay, steps / (steps + 10)))
                    for key, value in {"loss": loss.item(), **measured}.items():
                        figures.setdefault(key, []).append(value)
                means = {key: sum(values) / len(values) for key, values in figures.items()}
                self._save(checkpoint, epoch, module, average, optimizer)
                self._log(stage, epoch, {**means, "seconds": time.monotonic() - started})
                text = " ".join(f"{key} {value:.3f}" for key, value in means.items())
                bar.update(task, completed=epoch + 1, figures=text)
        return average.eval()

    def checkpoint(self, stage: str) -> Path:
        """The file that a stage resumes from."""
        return self.folder / f"{stage}.ckpt"

    def load_average(self, stage: str, module: nn.Module) -> None:
        """Load what an unfinished stage would return if it ended now. Raises InvalidInput before the first epoch."""
        if not self.checkpoint(stage).exists():
            raise InvalidInput(f"{self.checkpoint(stage)}: no such file, nothing is trained yet")
        module.load_state_dict(torch.load(self.checkpoint(stage), weights_only=True, mmap=True)["average"])

    def _resume(self, path: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        if state.get("seed", self.seed) != self.seed:
            raise InvalidInput(f"{path} was made with seed {state['seed']}, this run has seed {self.seed}")
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"]) + 1

    def _save(
        self,
        path: Path,
        epoch: int,
        module: nn.Module,
        average: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        state = {
            "seed": self.seed,
            "epoch": epoch,
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(path)

    @property
    def log(self) -> Path:
        """One JSON line an epoch: stage, epoch, mean metrics, seconds."""
        return self.folder / "log.jsonl"

    def record(self, stage: str, seconds: float) -> None:
        """Log what a stage took that trains nothing."""
        self._log(stage, 0, {"seconds": seconds})

    def _log(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "epoch": epoch, **figures}) + "\n")

    def seconds(self) -> float:
        """Training time in seconds, over all stages and resumed runs."""
        return sum(float(line["seconds"]) for line in self.logged())

    def last_figures(self) -> dict[str, dict[str, float]]:
        """The metrics of the last epoch of every stage."""
        return {line.pop("stage"): line for line in self.logged()}

    def logged(self) -> list[dict[str, Any]]:
        """The lines of the log; none before the first stage has ended."""
        return read_lines(self.log)


def read_origin(folder: Path) -> dict[str, str] | None:
    """What the files of a folder were made from: None when it has none, nothing known when they do not say."""
    try:
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        used = folder.is_dir() and any(path.is_file() or path.name == "views" for path in folder.iterdir())
        return {} if used else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move `average` towards `module`; integer buffers are copied."""
    for retained, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if retained.dtype.is_floating_point:
            retained.lerp_(new, 1 - decay)
        else:
            retained.copy_(new)
