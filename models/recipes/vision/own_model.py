"""A user's own network: import it, propose cuts, and describe it as a bundle's architecture and task."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import ValidationError
from torch import nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.capturing import output_nodes
from isthmus.models.recipes.vision.cutting import Captured, Cut, blocks, cut_indices
from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.blocks import Blocks
from isthmus.models.vision.tasks import AnyTask, DetectTask, EmbedTask, SegmentTask

BUILDER = "graphs"


@dataclass(frozen=True)
class Detection:
    """What becomes a box, as a task that detects has it."""

    min_score: float = 0.3
    nms_iou: float = 0.6
    max_boxes: int = 100


PRICES = (2.0, 0.8, 0.3, 0.1)  # of `own.JPEG_SHARE` bytes, in units of cross-entropy
LATENT_CHANNELS, DECODER_CHANNELS = 32, 64  # at most; a feature map of fewer channels gives as many latents
HEAD_SHARE, FIRST_SHARE = 0.6, 0.5  # of the model's operations, before the cut; of these, before an earlier exit


def load_model(reference: str) -> nn.Module:
    """The module that `package.module:factory` returns when called without arguments.

    Raises InvalidInput when it cannot be imported, does not exist, fails, or returns something else.
    """
    if reference.endswith(".onnx"):
        raise InvalidInput(
            f"--model {reference}: ONNX files are not taken, give the torch.nn.Module that it was exported from,"
            " as package.module:factory"
        )
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise InvalidInput(f"--model {reference!r}: expected package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory()
    except Exception as error:  # any, from the user's code
        raise InvalidInput(f"--model {reference}: {type(error).__name__}: {str(error).splitlines()[:1]}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model {reference} made a {type(model).__name__}, expected a torch.nn.Module")
    return model.float().eval()


def proposed(captured: Captured) -> tuple[str, ...]:
    """One or two cuts: the smallest feature map within HEAD_SHARE of the operations, and one for an earlier exit.

    Of maps of one size the earliest; of sequences of tokens, which all have one, the latest.
    """
    tokens = {cut.name for index, cut in enumerate(captured.cuts) if captured.is_tokens(index)}

    def smallest(share: float, of: int) -> Cut:
        within = [cut for cut in captured.cuts if cut.macs <= share * of] or list(captured.cuts[:1])
        return min(within, key=lambda cut: (cut.values, -cut.macs if cut.name in tokens else cut.macs))

    main = smallest(HEAD_SHARE, captured.macs)
    first = smallest(FIRST_SHARE, main.macs)
    return (first.name, main.name) if first.macs < main.macs else (main.name,)


def task_of(captured: Captured, name: str, labels: Sequence[str], detection: Detection) -> AnyTask:
    """The task of a network that answers no class. Raises InvalidInput where its answer is none of the task's."""
    shape = output_nodes(captured.graph)[-1].meta["val"].shape
    named = tuple(labels) or tuple(f"class {index}" for index in range(captured.channels))
    try:
        if captured.kind == "detect":
            return DetectTask(name=name, labels=named, **asdict(detection))
        if captured.kind == "segment":
            return SegmentTask(name=name, labels=named, shape=(int(shape[2]), int(shape[3])))
        return EmbedTask(name=name, size=captured.channels)
    except ValidationError as error:
        raise InvalidInput(
            f"the model's answer is no task of kind {captured.kind}: {error.errors()[0]['msg']}"
        ) from None


def backbone(captured: Captured, cuts: Sequence[str]) -> Blocks:
    """The model's blocks, with up to two more cuts after the last one, where features are compared in training."""
    later = [cut.name for cut in captured.cuts[cut_indices(captured, cuts)[-1] + 1 :]]
    extra = sorted({len(later) // 2, len(later) - 1}) if len(later) > 1 else range(len(later))
    chosen = [*cuts, *(later[index] for index in extra)]
    channels = {cut.name: cut.shape[0] for cut in captured.cuts}
    return Blocks(list(blocks(captured, chosen).children()), [channels[name] for name in chosen])


def architecture(captured: Captured, cuts: Sequence[str]) -> Architecture:
    """One tap after the last cut, with a tail of its own."""
    (channels,) = (cut.shape[0] for cut in captured.cuts if cut.name == cuts[-1])
    tap = TapArchitecture(
        after=len(cuts),
        rejoin=len(cuts),
        own_tail=True,
        latent_channels=min(LATENT_CHANNELS, channels),
        decoder_channels=DECODER_CHANNELS,
        rates=len(PRICES),
    )
    numbers = tuple(range(1, len(cuts) + 1))
    return Architecture(builder=BUILDER, backbone="own", classes=(captured.channels,), cuts=numbers, taps=(tap,))


def table(
    captured: Captured, chosen: Sequence[str], image_values: int, measured: Mapping[str, float] | None = None
) -> list[str]:
    """Lines about where the model can be cut: share of operations and time before the cut, values and bytes sent.

    Cuts with more values than an earlier one are left out unless they are chosen or their bytes were measured.
    """
    sizes = measured or {}
    lines = ["  cut                               shape           MMAC   share    ms   values, of the image's"]
    lines[0] += "   bytes" if sizes else ""
    least = captured.cuts[0].values
    for cut in captured.cuts:
        if cut.values > least and cut.name not in (*chosen, *sizes):
            continue
        least = min(least, cut.values)
        mark = ">" if cut.name in chosen else " "
        shape = "x".join(map(str, cut.shape))
        lines.append(
            f"{mark} {cut.name:<32}  {shape:<12} {cut.macs / 1e6:7.1f}  {cut.macs / captured.macs:5.0%}"
            f"  {1000 * cut.seconds:6.1f}  {cut.values:8} {cut.values / image_values:5.0%}"
            + (f"  {sizes[cut.name]:12.0f}" if cut.name in sizes else "")
        )
    if left_out := len(captured.cuts) + 1 - len(lines):
        lines.append(f"  and {left_out} more with more values than an earlier one")
    return lines
