"""A small vision transformer and its training with exits. No weights of one can be had as a package.

    images -> stem: two convolutions of stride 2 -> tokens -> layers -> mean -> logits
                                                       |  exits after some of them

The stem is convolutions in place of patches, with which so small a transformer learns from few images (Xiao et al.,
"Early Convolutions Help Transformers See Better", NeurIPS 2021). The layers are those of DeiT (Touvron et al., 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.augment import random_affine, random_mirror
from isthmus.models.recipes.vision.exit_heads import token_exits
from isthmus.models.recipes.vision.own_data import Images
from isthmus.models.recipes.vision.own_training import EPOCH_IMAGES, normalised
from isthmus.models.vision.manifest import Preprocessing

WIDTH, LAYERS, HEADS, RATIO = 48, 8, 3, 2
EXITS = (2, 3, 4)  # layers before each exit
BATCH, PEAK_LR, SMOOTHING = 64, 2e-3, 0.1
FINAL = 12.0  # weight of the last layer's answer; an exit's is the number of layers before it


class Layer(nn.Module):
    """Attention and a perceptron, each normalised before and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, RATIO * width), nn.Linear(RATIO * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm1(x_BND)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x_BND = x_BND + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        y_BND: Tensor = x_BND + self.down(F.gelu(self.up(self.norm2(x_BND))))
        return y_BND


class Stem(nn.Module):
    """Images -> tokens of a quarter of the side, with their learned positions."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // 4) ** 2, width))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.convolutions(images_B3HW).flatten(2).transpose(1, 2)
        return tokens_BND + self.position


class SmallVit(nn.Module):
    """Images of `side` pixels -> logits."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.stem = Stem(side, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BND = self.stem(images_B3HW)
        for layer in self.layers:
            x_BND = layer(x_BND)
        return self.answer(x_BND)

    def answer(self, x_BND: Tensor) -> Tensor:
        """Logits from the tokens after the last layer."""
        logits_BK: Tensor = self.classifier(self.norm(x_BND).mean(1))
        return logits_BK


class WithExits(nn.Module):
    """The first stage of LGViT: network and exits together, so that early layers learn what early answers need."""

    def __init__(self, net: SmallVit, side: int, classes: int) -> None:
        super().__init__()
        self.net, self.side = net, side // 4
        self.exits = token_exits([WIDTH] * len(EXITS), classes)

    def forward(self, images_B3HW: Tensor, exits: bool = True) -> list[Tensor]:
        """Logits of each exit, unless left out, then of the network."""
        x_BND, found = self.net.stem(images_B3HW), list[Tensor]()
        for number, layer in enumerate(self.net.layers, 1):
            x_BND = layer(x_BND)
            if exits and number in EXITS:
                map_BDHW = x_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
                found.append(self.exits[EXITS.index(number)](map_BDHW))
        return [*found, self.net.answer(x_BND)]


@dataclass(frozen=True)
class Batch:
    """Augmented images, their classes, and whether exits count."""

    images_B3HW: Tensor
    label_B: Tensor
    exits: bool


def train(run: Run, part: Images, spec: Preprocessing, classes: int, epochs: int) -> WithExits:
    """Train from random weights, every second step for the last answer alone; returns it averaged, in eval mode."""
    torch.manual_seed(run.seed)
    assert part.labels_N is not None
    labels_N = torch.from_numpy(part.labels_N)
    module = WithExits(SmallVit(spec.crop[0], classes), spec.crop[0], classes)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(part), generator=generator)[:EPOCH_IMAGES]
        for number, start in enumerate(range(0, len(order) - BATCH + 1, BATCH)):
            chosen = order[start : start + BATCH]
            images_B3HW = torch.from_numpy(part.images_N3HW[chosen.numpy()]).float() / 255
            images_B3HW = random_affine(random_mirror(images_B3HW, generator), generator)
            yield Batch(normalised(images_B3HW, spec), labels_N[chosen], number % 2 == 1)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        answers = module(batch.images_B3HW, batch.exits)
        right = (answers[-1].argmax(1) == batch.label_B).float().mean()
        return alternating(answers, batch), {"right": right.item()}

    average = run.fit(
        "network", module, batches, loss_of, Schedule(epochs, len(part) // BATCH, PEAK_LR, warmup_epochs=0.5)
    )
    assert isinstance(average, WithExits)
    return average


def alternating(answers: Sequence[Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of the last answer, or of all in proportion to the layers before them."""
    losses = [F.cross_entropy(answer_BK, batch.label_B, label_smoothing=SMOOTHING) for answer_BK in answers]
    weights = [*map(float, EXITS), FINAL] if batch.exits else [FINAL]
    total: Tensor = sum((w * loss for w, loss in zip(weights, losses, strict=True)), start=torch.zeros(()))
    return total / sum(weights)
