"""A user's own classifier: imported, cut, and as the architecture of a bundle."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.cutting import Captured, Cut, blocks, places
from isthmus.models.vision.blocks import Blocks
from isthmus.models.vision.manifest import Architecture, TapArchitecture

BUILDER = "graphs"
PRICES = (2.0, 0.8, 0.3, 0.1)  # of JPEG_SHARE, in units of cross-entropy
LATENT_CHANNELS, DECODER_CHANNELS = 32, 64  # of fewer channels, as many latents
HEAD_SHARE, FIRST_SHARE = 0.6, 0.5  # of the model's operations before the cut; of those, before an earlier exit


def load_model(reference: str) -> nn.Module:
    """The module that `package.module:factory` makes, called without arguments.

    Raises InvalidInput when it cannot be imported, is not there, fails, or gives something else.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise InvalidInput(f"--model {reference!r}: expected package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory()
    except Exception as error:  # it is not our code
        raise InvalidInput(f"--model {reference}: {type(error).__name__}: {str(error).splitlines()[:1]}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model {reference} made a {type(model).__name__}, expected a torch.nn.Module")
    return model.float().eval()


def proposed(captured: Captured) -> tuple[str, ...]:
    """One or two cuts: the smallest feature map within HEAD_SHARE of the operations, and one for an earlier exit."""

    def smallest(share: float, of: int) -> Cut:
        within = [cut for cut in captured.cuts if cut.macs <= share * of] or list(captured.cuts[:1])
        return min(within, key=lambda cut: (cut.values, cut.macs))

    main = smallest(HEAD_SHARE, captured.macs)
    first = smallest(FIRST_SHARE, main.macs)
    return (first.name, main.name) if first.macs < main.macs else (main.name,)


def backbone(captured: Captured, cuts: Sequence[str]) -> Blocks:
    """The model's blocks; behind the last cut two more, if they can be, where features are compared in training."""
    behind = [cut.name for cut in captured.cuts[places(captured, cuts)[-1] + 1 :]]
    extra = sorted({len(behind) // 2, len(behind) - 1}) if len(behind) > 1 else range(len(behind))
    chosen = [*cuts, *(behind[index] for index in extra)]
    channels = {cut.name: cut.shape[0] for cut in captured.cuts}
    return Blocks(list(blocks(captured, chosen).children()), [channels[name] for name in chosen])


def architecture(captured: Captured, cuts: Sequence[str]) -> Architecture:
    """One tap behind the last cut, with a tail of its own."""
    (channels,) = (cut.shape[0] for cut in captured.cuts if cut.name == cuts[-1])
    tap = TapArchitecture(
        after=len(cuts),
        rejoin=len(cuts),
        own_tail=True,
        latent_channels=min(LATENT_CHANNELS, channels),
        decoder_channels=DECODER_CHANNELS,
        rates=len(PRICES),
    )
    places = tuple(range(1, len(cuts) + 1))
    return Architecture(builder=BUILDER, backbone="own", classes=(captured.classes,), cuts=places, taps=(tap,))


def table(captured: Captured, chosen: Sequence[str], image_values: int) -> list[str]:
    """Where the model can be cut: the share of its operations and time before, and the values that cross.

    Cuts that more values cross than an earlier one are left out unless they are chosen.
    """
    lines = ["  cut                               shape           MMAC   share    ms   values, of the image's"]
    least = captured.cuts[0].values
    for cut in captured.cuts:
        if cut.values > least and cut.name not in chosen:
            continue
        least = min(least, cut.values)
        mark = ">" if cut.name in chosen else " "
        shape = "x".join(map(str, cut.shape))
        lines.append(
            f"{mark} {cut.name:<32}  {shape:<12} {cut.macs / 1e6:7.1f}  {cut.macs / captured.macs:5.0%}"
            f"  {1000 * cut.seconds:6.1f}  {cut.values:8} {cut.values / image_values:5.0%}"
        )
    if left_out := len(captured.cuts) + 1 - len(lines):
        lines.append(f"  and {left_out} more, which more values cross than an earlier one")
    return lines
