"""Fixed augmented views of the training photographs with the teacher's outputs for each, computed once.

Many bottlenecks (rates, widths, baselines) are distilled from one frozen teacher, whose forward pass costs more than
all the rest. Eight views a photograph, one for each flip and quarter turn, are about as many as a dozen epochs use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.recipes.vision.augment import dihedral, random_affine, random_contrast

VIEWS = 8
BATCH = 16

Arrays = dict[str, NDArray[Any]]
Compute = Callable[[Tensor], Mapping[str, Tensor]]  # grey images in [0, 1], BHW -> named arrays, one row an image


@dataclass(frozen=True)
class Views:
    """Memory-mapped arrays by name, for each view: `images` uint8 (N, H, W), and float16 arrays computed from them."""

    passes: tuple[Arrays, ...]

    def __len__(self) -> int:
        return len(self.passes[0]["images"])

    def batches(
        self, generator: torch.Generator, names: Sequence[str] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
        """One epoch in random order, a random view of each photograph: indices, and arrays by name in float32."""
        order = torch.randperm(len(self), generator=generator).numpy()
        chosen_N = torch.randint(len(self.passes), (len(self),), generator=generator).numpy()
        for start in range(0, len(self) - BATCH + 1, BATCH):
            indices = order[start : start + BATCH]
            yield (
                indices,
                {name: self._gather(name, indices, chosen_N[indices]) for name in names or self.passes[0]},
            )

    def _gather(self, name: str, indices: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        rows = [self.passes[view][name][index] for index, view in zip(indices, views, strict=True)]
        batch = torch.from_numpy(np.stack(rows)).float()
        if name == "images":
            batch.div_(255)
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def make_views(folder: Path, images_NHW: NDArray[np.uint8], seed: int) -> Views:
    """Compute the views that `folder` lacks, and open all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(VIEWS):
        write(folder, view, "images", images_NHW, augmented(view, torch.Generator().manual_seed(seed * VIEWS + view)))
    return open_views(folder)


def draw_views(
    folder: Path, count: int, shape: tuple[int, ...], rows: Iterable[NDArray[np.uint8]], views: int = VIEWS
) -> Views:
    """Write `rows`, each all views of one photograph (views, *shape), unless that was done before; open the views."""
    folder.mkdir(parents=True, exist_ok=True)
    markers = [folder / f"{view}.images.done" for view in range(views)]
    if not all(marker.exists() for marker in markers):
        paths = [folder / f"{view}.images.npy" for view in range(views)]
        files = [open_memmap(path, "w+", np.uint8, (count, *shape)) for path in paths]  # type: ignore[no-untyped-call]
        for row, images in enumerate(rows):
            for file, image in zip(files, images, strict=True):
                file[row] = image
        for marker in markers:
            marker.touch()
    return open_views(folder)


def augmented(view: int, generator: torch.Generator) -> Compute:
    """Dihedral transform number `view`, then a small random affine map and contrast."""

    def look(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        images_B1HW = random_affine(dihedral(grey_BHW.unsqueeze(1), view), generator)
        return {"images": random_contrast(images_B1HW, generator)[:, 0].mul(255).round().to(torch.uint8)}

    return look


def extend(folder: Path, stage: str, compute: Compute) -> Views:
    """Compute arrays from every view's images, unless `stage` was done before."""
    images = open_views(folder)
    for view, arrays in enumerate(images.passes):
        write(folder, view, stage, arrays["images"], compute)
    return open_views(folder)


def open_views(folder: Path) -> Views:
    """The arrays that all views of a folder have, memory-mapped."""
    views = range(len([*folder.glob("*.images.npy")]))
    found = [{path.name.split(".")[1] for path in folder.glob(f"{view}.*.npy")} for view in views]
    names = sorted(set.intersection(*found))
    return Views(
        tuple({name: np.load(folder / f"{view}.{name}.npy", mmap_mode="r") for name in names} for view in views)
    )


@torch.no_grad()
def write(folder: Path, view: int, stage: str, images_NHW: NDArray[Any], compute: Compute) -> None:
    """Write one view's arrays, then a marker that they are complete, so that an interrupted run resumes after it."""
    marker = folder / f"{view}.{stage}.done"
    if marker.exists():
        return
    files: dict[str, NDArray[Any]] = {}
    for start in track(range(0, len(images_NHW), BATCH), f"{stage}, view {view + 1}"):
        grey_BHW = torch.from_numpy(np.array(images_NHW[start : start + BATCH])).float() / 255
        for name, target in compute(grey_BHW).items():
            rows = (target if target.dtype is torch.uint8 else target.half()).numpy()
            if name not in files:
                shape = (len(images_NHW), *rows.shape[1:])
                path = folder / f"{view}.{name}.npy"
                files[name] = open_memmap(path, "w+", rows.dtype, shape)  # type: ignore[no-untyped-call]
            files[name][start : start + len(rows)] = rows
    marker.touch()
