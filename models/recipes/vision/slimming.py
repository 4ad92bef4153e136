"""An encoder of the image, distilled from the cloud model's first blocks at every width: all learn the same latent.

    image crops -> first blocks (frozen)      -> components
                -> slimmable encoder, width w -> latent -> distance to them, summed over two widths

Channels are sorted by importance before they are copied, because a width uses the first ones. The widest width is
initialised as the teacher, except for blocks that the encoder leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.distil import relative_distance
from isthmus.models.vision.efficientnet_lite import SameConv2d, fuse_batch_norms
from isthmus.models.vision.slim import SlimConv, SlimEncoder, conv_norms

CROP = 160  # pixels; the receptive field of such early features is smaller


class Slimming(nn.Module):
    """A slimmable encoder and its teacher. Every batch trains the narrowest width and one of the others."""

    def __init__(self, encoder: SlimEncoder, blocks: nn.Sequential, components: Components) -> None:
        """`blocks`: the trained teacher's, up to the features that the latent represents."""
        super().__init__()
        self.encoder, self.components = encoder, components
        self.teacher = fuse_batch_norms(deepcopy(blocks).eval()).requires_grad_(False)

    def train(self, mode: bool = True) -> Slimming:
        """The teacher stays in eval mode, and the widest width keeps the teacher's batch-norm statistics."""
        super().train(mode)
        self.teacher.eval()
        for conv in (module for module in self.encoder.modules() if isinstance(module, SlimConv)):
            conv.norms[-1].eval()
        return self

    def loss(self, crops_B3HW: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Distance to the teacher's latent in units of its variance, summed over the widths of this batch."""
        widths = self.encoder.widths
        chosen = [0, *(torch.randint(1, len(widths), (1,)).tolist() if len(widths) > 1 else ())]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features_BCHW = self.teacher(crops_B3HW)
            found = [self.encoder(crops_B3HW, width) for width in chosen]
        wanted_BCHW = self.components.latent(features_BCHW)
        distances = [relative_distance(wanted_BCHW, latent_BCHW) for latent_BCHW in found]
        figures = {f"width {widths[w]}": distance.item() for w, distance in zip(chosen, distances, strict=True)}
        return torch.stack(distances).sum(), figures


def random_crops(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """One random square of CROP pixels, the same for the whole batch."""
    height, width = images_BCHW.shape[2:]
    top = int(torch.randint(max(height - CROP, 0) + 1, (), generator=generator))
    left = int(torch.randint(max(width - CROP, 0) + 1, (), generator=generator))
    return images_BCHW[..., top : top + CROP, left : left + CROP].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def sorted_channels(blocks: nn.Sequential, images_B3HW: Tensor) -> nn.Sequential:
    """A copy that computes the same function, with channels inside and between blocks sorted by importance.

    Importance of a channel: its deviation over the images times the norm of the weights that read it.
    """
    copy = deepcopy(blocks).eval()
    pairs = [pair for block in copy for pair in conv_norms(block)]
    starts = {conv_norms(block)[0][0]: block for block in copy}
    deviations = channel_deviations([norm for _, norm in pairs], copy, images_B3HW)
    order = torch.arange(pairs[0][0].in_channels)
    entry, block = order, copy[0]
    for index, (conv, norm) in enumerate(pairs):
        if conv in starts:
            entry, block = order, starts[conv]
        if conv.groups == 1:
            conv.weight.copy_(conv.weight[:, order])
            closes = index + 1 == len(pairs) or pairs[index + 1][0] in starts
            if closes and getattr(block, "residual", False):
                order = entry
            elif index + 1 < len(pairs):
                order = importance(pairs, deviations, index).argsort(descending=True)
            else:
                order = torch.arange(conv.out_channels)
        conv.weight.copy_(conv.weight[order])
        for tensor in norm.state_dict().values():
            if tensor.ndim:
                tensor.copy_(tensor[order])
    return copy


def importance(pairs: Sequence[tuple[SameConv2d, nn.BatchNorm2d]], deviations: Sequence[Tensor], index: int) -> Tensor:
    """Importance of each output channel of convolution `index` to the next dense convolution, past a depthwise one."""
    last = index + 1 if pairs[index + 1][0].groups > 1 else index
    reader = pairs[last + 1][0].weight
    weights: Tensor = deviations[last] * reader.flatten(2).norm(dim=2).norm(dim=0)
    return weights


def channel_deviations(norms: Sequence[nn.Module], net: nn.Module, images_B3HW: Tensor) -> list[Tensor]:
    """Standard deviation of every output channel of each of `norms`."""
    found: list[Tensor] = []
    hooks = [norm.register_forward_hook(lambda _m, _i, y: found.append(y.float().std((0, 2, 3)))) for norm in norms]
    net(images_B3HW)
    for hook in hooks:
        hook.remove()
    return found
