"""Which device a name means, and copies to it and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models import torch_device
from isthmus.models.errors import InvalidInput
from isthmus.models.torch_device import CPU, describe_device, download, open_device, upload

META = torch.device("meta")  # holds no values; copies to it are what is looked at


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA devices that the driver reports: what each answers to the first product, empty where it works."""
    found: list[str] = []

    def ones(size: int, device: torch.device) -> torch.Tensor:
        if found[device.index]:
            raise RuntimeError(found[device.index])
        return torch.zeros(size)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch_device.torch, "ones", ones)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return found


def test_the_cpu_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("the driver was asked"))
    assert open_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_without_cuda_one_line_says_so(name: str, cards: list[str]) -> None:
    with pytest.raises(InvalidInput, match=rf"^--device {name} cannot be used: there are 0 CUDA devices$"):
        open_device(name)
    assert open_device("auto") == CPU
    assert describe_device(CPU) == "the CPU: there are 0 CUDA devices"


def test_a_build_without_cuda_is_named(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InvalidInput, match=r"there are 0 CUDA devices; this PyTorch, .*, is built without CUDA$"):
        open_device("cuda:3")


def test_a_card_that_works_is_taken(cards: list[str]) -> None:
    cards += [""]
    assert open_device("cuda") == open_device("cuda:0") == open_device("auto") == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(InvalidInput, match="cuda:1 cannot be used: there is 1 CUDA device$"):
        open_device("cuda:1")


def test_a_card_that_fails_is_named_with_its_reason(cards: list[str]) -> None:
    cards += ["", "CUDA error: no kernel image is available\nFor debugging consider CUDA_LAUNCH_BLOCKING=1"]
    with pytest.raises(
        InvalidInput, match="^--device cuda:1 cannot be used: CUDA error: no kernel image is available$"
    ):
        open_device("cuda:1")
    cards.reverse()
    assert open_device("auto") == CPU
    assert describe_device(CPU) == "the CPU: CUDA error: no kernel image is available"


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3.0)
    assert upload(tensor, CPU) is tensor
    download(tensor)[0] = 7
    assert tensor[0] == 7


def test_copies_to_a_device_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pins: list[torch.Tensor] = []
    monkeypatch.setattr(torch_device, "pinned", lambda tensor: pins.append(tensor) or tensor)
    tensor = torch.arange(3)
    moved = upload(tensor, META)
    assert (moved.device, moved.shape, pins) == (META, (3,), [tensor])
    assert upload(moved, META) is moved and len(pins) == 1


def test_what_is_read_back_is_pinned_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose queue writes the copy when it is waited for."""
    queued: list[torch.Tensor] = []

    class Host(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            assert non_blocking and source.device == META
            queued.append(self)
            return self

    class Stream:
        def synchronize(self) -> None:
            queued.pop().as_subclass(torch.Tensor).fill_(5)

    monkeypatch.setattr(torch_device, "pinned", lambda tensor: tensor.as_subclass(Host))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    found = download(torch.empty(2, 3, device=META))
    assert found.dtype == np.float32 and (np.asarray(found) == 5).all() and found.shape == (2, 3)
