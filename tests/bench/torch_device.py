"""A device with PyTorch, for comparison: one photo through trunk and exits. Started by `tests.bench.footprint`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import open_image, preprocess
from isthmus.models.vision.tail import load_split


@torch.inference_mode()
def answer(photo: Path, folder: Path) -> str:
    """The label of the first exit that reaches the bundle's strictest threshold, or else of the last."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    split = load_split(bundle)
    sure = max((min(each.confidences) for each in manifest.heads["fp32"].thresholds if each.answers), default=1.0)
    x_BCHW = torch.from_numpy(preprocess(open_image(photo.read_bytes()), manifest.preprocessing))[None]
    probabilities_K = torch.zeros(len(manifest.tasks[0].labels))
    for index, head in enumerate(split.exits):
        x_BCHW = split.segment(index, x_BCHW)
        probabilities_K = head(x_BCHW).softmax(1)[0]
        if probabilities_K.max() >= sure:
            break
    return manifest.tasks[0].labels[int(probabilities_K.argmax())]


if __name__ == "__main__":
    print(json.dumps({"label": answer(Path(sys.argv[1]), Path(sys.argv[2]))}))
