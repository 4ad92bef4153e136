from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.models.recipes.common import origin
from isthmus.models.recipes.vision.cutting import capture


def test_a_hash_of_arrays_is_of_values_types_and_shapes() -> None:
    values = np.arange(6, dtype=np.int32)
    others = [values.astype(np.int64), values.reshape(2, 3), values + 1, None, torch.tensor(1.0), torch.empty(0)]
    assert len({origin.of_arrays(each) for each in (values, *others)}) == 7
    assert origin.of_arrays(values) == origin.of_arrays(np.arange(12, dtype=np.int32)[:6])


def test_a_hash_of_files_is_of_their_contents_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    before = origin.of_files(paths)
    assert origin.of_files(reversed(paths)) != before == origin.of_files(paths)
    paths[1].write_text("c")
    assert origin.of_files(paths) != before


class Net(nn.Module):
    """A weight, a buffer that no checkpoint has, and a constant."""

    def __init__(self, weight: float, buffer: float, constant: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        nn.init.constant_(self.conv.weight, weight)
        nn.init.zeros_(self.conv.bias)
        self.register_buffer("scale", torch.full((4, 1, 1), buffer), persistent=False)
        self.constant = torch.full((4, 1, 1), constant)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (self.conv(x_BCHW) * self.scale + self.constant).relu().mean((2, 3))


def test_a_hash_of_a_graph_is_of_everything_that_it_computes_with() -> None:
    hashes = [origin.of_graph(capture(Net(*values), (3, 8, 8)).graph) for values in ((1, 2, 3),) * 2]
    assert hashes[0] == hashes[1]
    for changed in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert origin.of_graph(capture(Net(*changed), (3, 8, 8)).graph) != hashes[0]
