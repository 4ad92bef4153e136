"""The cloud model of ELPV: EfficientNet-Lite2, fine-tuned from ImageNet weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.augment import random_affine, random_contrast, random_dihedral
from isthmus.models.recipes.vision.elpv_data import Photos
from isthmus.models.recipes.vision.imagenet import DEVIATION, MEAN, load_lite2
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.manifest import Preprocessing

CLOUD_SIZES = ((10, 224), (18, 300))  # (until epoch, pixels): progressive resizing, EfficientNetV2 section 4.3
REFINE_EPOCHS = 12  # a second cosine cycle at full size (SGDR, section 3): the loss still falls when the first ends
PREPROCESSING = Preprocessing(resize=300, crop=(300, 300), mean=(MEAN,) * 3, deviation=(DEVIATION,) * 3)


@dataclass(frozen=True)
class PhotoBatch:
    """Augmented photographs and the annotators' probability of a defect."""

    images_B3HW: Tensor
    defect_B: Tensor
    ramp: float = 1.0  # factor of the price of bytes


def normalise(images_BHW: Tensor) -> Tensor:
    """Grey values in [0, 1] -> network input, B3HW, channels last."""
    grey_B1HW = ((images_BHW - MEAN) / DEVIATION).unsqueeze(1)
    return grey_B1HW.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def batches(photos: Photos, size: int, generator: torch.Generator) -> Iterator[PhotoBatch]:
    """One epoch of augmented batches at `size` pixels, in random order, without a last partial batch."""
    order = torch.randperm(len(photos), generator=generator)
    for chosen in torch.split(order, BATCH):
        if len(chosen) < BATCH:
            return
        images_B1HW = torch.from_numpy(photos.images_NHW[chosen.numpy()]).float().div_(255).unsqueeze(1)
        images_B1HW = random_affine(random_dihedral(images_B1HW, generator), generator)
        if images_B1HW.shape[-1] != size:
            images_B1HW = F.interpolate(images_B1HW, size=(size, size), mode="bilinear", antialias=True)
        images_B1HW = random_contrast(images_B1HW, generator)
        yield PhotoBatch(normalise(images_B1HW[:, 0]), torch.from_numpy(photos.defect_N[chosen.numpy()]))


def soft_cross_entropy(logits_B2: Tensor, defect_B: Tensor) -> Tensor:
    """Cross-entropy to the annotators' probability (0, 1/3, 2/3, 1) in place of a hard label."""
    log_p_B2 = logits_B2.float().log_softmax(1)
    return -(defect_B * log_p_B2[:, 1] + (1 - defect_B) * log_p_B2[:, 0]).mean()


def train_cloud(run: Run, photos: Photos) -> EfficientNetLite:
    """Fine-tune EfficientNet-Lite2 from ImageNet weights in two cycles; returns the averaged network in eval mode."""
    torch.manual_seed(run.seed)
    net = EfficientNetLite("efficientnet_lite2", classes=2, dropout=0.3)
    load_lite2(net)
    net.set_drop_path(0.1)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[PhotoBatch]:
        size = next(pixels for until, pixels in CLOUD_SIZES if epoch < until)
        return batches(photos, size, generator)

    def loss_of(batch: PhotoBatch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits_B2 = net(batch.images_B3HW)
        right = (logits_B2.argmax(1) == (batch.defect_B >= 0.5)).float().mean()
        return soft_cross_entropy(logits_B2, batch.defect_B), {"right": right.item()}

    def refine_batches(epoch: int, generator: torch.Generator) -> Iterator[PhotoBatch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    steps = len(photos) // BATCH
    average = run.fit("cloud", net, epoch_batches, loss_of, Schedule(CLOUD_SIZES[-1][0], steps, peak_lr=5e-4))
    net.load_state_dict(average.state_dict())
    average = run.fit("refine", net, refine_batches, loss_of, Schedule(REFINE_EPOCHS, steps, peak_lr=3e-4))
    assert isinstance(average, EfficientNetLite)
    return average
