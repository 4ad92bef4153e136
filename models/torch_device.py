"""Where PyTorch computes: the CPU or one CUDA device. Copies to a CUDA device and back go through pinned memory."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.models.errors import InvalidInput

CPU = torch.device("cpu")
MAX_REASON = 200  # characters of an error of CUDA


def open_device(name: str) -> torch.device:
    """The device of `cpu`, `cuda`, `cuda:N` or `auto`: CUDA where it can be used, else the CPU. Raises InvalidInput."""
    if name == "cpu":
        return CPU
    index = int(name.partition(":")[2] or 0)
    problem = cuda_problem(index)
    if problem is None:
        # Products in TF32 keep ten bits; bundles are certified with float32.
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", index)
    if name == "auto":
        return CPU
    raise InvalidInput(f"--device {name} cannot be used: {problem}")


def cuda_problem(index: int) -> str | None:
    """Why a CUDA device cannot be used; None where it can."""
    count = torch.cuda.device_count()
    if index >= count:
        found = "there is 1 CUDA device" if count == 1 else f"there are {count} CUDA devices"
        return found if torch.version.cuda else f"{found}; this PyTorch, {torch.__version__}, is built without CUDA"
    try:  # a driver that is too old, or a card that this build has no kernels for
        torch.ones(1, device=torch.device("cuda", index)).add(1).item()
    except RuntimeError as error:
        return str(error).splitlines()[0][:MAX_REASON]
    return None


def describe_device(device: torch.device) -> str:
    """A device for a log line: the card and its memory, or why it is the CPU."""
    if device.type == "cpu":
        return f"the CPU: {cuda_problem(0) or 'it was asked for'}"
    card = torch.cuda.get_device_properties(device)
    return f"{device}, {card.name} with {card.total_memory >> 20} MiB"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory -> on the device. Work that is queued on the device after it sees the copy."""
    return tensor if tensor.device == device else pinned(tensor).to(device, non_blocking=True)


def download(tensor: Tensor) -> NDArray[Any]:
    """A tensor on any device -> NumPy, once what is queued before it has been computed."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    host = pinned(torch.empty(tensor.shape, dtype=tensor.dtype))
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host.numpy()


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which PyTorch keeps and hands out again."""
    return tensor.pin_memory()
