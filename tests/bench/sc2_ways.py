"""All methods to send a photo to the cloud, with one interface: our bottlenecks, those of other papers, image files.

    photo -encode-> payload ~~~ payload -decode-> input of the tail -answer-> probabilities_K

Knows nothing about measurements.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import InvalidInput
from isthmus.models.messages import Codec
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import Tail, load_split
from tests.bench.image_codecs import CODECS, ImageCodec, ladder

if TYPE_CHECKING:
    from isthmus.models.recipes.vision.baselines import Baseline
    from isthmus.models.recipes.vision.single import SingleRate

OURS = "ours"
TRAINED = ("bq", "entropic-student", "n0", "n4", "ours-single")  # by `models.recipes.vision.baselines` and `single`
METHODS = (*CODECS, *TRAINED, OURS)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Photo:
    """A photo, RGB, and its preprocessed array."""

    image: Image.Image
    pixels_CHW: Floats


@dataclass(frozen=True)
class Way:
    """A method at a setting. Encoder: sizes in bits as SC2 counts them, cost in multiply-accumulates a photo.

    `decode` is None where decoding and tail are not separate: then `answer` takes the payload.
    """

    method: str  # one curve
    setting: str
    encoder_bits: int
    encoder_macs: int
    codec: Codec
    tap: int
    rate: int
    encode: Callable[[Photo], bytes]
    decode: Callable[[bytes], Any] | None
    answer: Callable[[Any], Floats]


def lossless(bundle: Bundle, tail: Tail | GraphTail) -> Way:
    """The cloud model on original photos."""
    return image_way(bundle, tail, "cloud model", ("png", ImageCodec("png", 100)))


def trained_for(bundle: Bundle) -> tuple[str, ...]:
    """Methods that were trained on a bundle's photos: only for ELPV."""
    return TRAINED if bundle.manifest.tasks[0].name == "defect" else ()


def ways(bundle: Bundle, head: Head, tail: Tail | GraphTail, work: Path, methods: Sequence[str] | None) -> list[Way]:
    """All settings of `methods`; None: of every method that is ready. Trained runs are in `work`.

    Raises InvalidInput for a named method whose training is missing or not finished.
    """
    chosen = (*CODECS, *trained_for(bundle), OURS) if methods is None else methods
    found = [image_way(bundle, tail, form, step) for form in CODECS if form in chosen for step in steps(form, bundle)]
    for method in (method for method in TRAINED if method in chosen):
        try:
            found += [trained_way(baseline) for baseline in trained(work, method, bundle)]
        except InvalidInput as error:
            if methods is not None:
                command = training_command([method], work)
                raise InvalidInput(f"no finished runs of {method} under {work}; train it first: {command}") from error
    return [*found, *(own_ways(bundle, head, tail) if OURS in chosen else ())]


def training_command(methods: Sequence[str], work: Path) -> str:
    return f"python -m isthmus.models.recipes baselines {' '.join(methods)} --work {shlex.quote(str(work))}"


def steps(form: str, bundle: Bundle) -> list[tuple[str, ImageCodec]]:
    manifest = bundle.manifest
    return ladder(form, manifest.preprocessing.resize, coarse=manifest.tasks[0].name != "defect")


def image_way(bundle: Bundle, tail: Tail | GraphTail, method: str, named: tuple[str, ImageCodec]) -> Way:
    """A whole photo as a file, into the unsplit cloud model; its encoder has no network."""
    setting, codec = named

    def decode(data: bytes) -> Floats:
        return preprocess(codec.decode(data), bundle.manifest.preprocessing)

    return Way(
        method, setting, 0, 0, Codec.IMAGE, 0, 0,
        encode=lambda photo: codec.encode(photo.image),
        decode=decode,
        answer=lambda pixels_CHW: tail.answer_images([pixels_CHW])[0],
    )  # fmt: skip


def own_ways(bundle: Bundle, head: Head, tail: Tail | GraphTail) -> Iterator[Way]:
    """Every tap, width and rate of a bundle. The widest of the first tap is `ours`; others name tap and width."""
    for index, tap in enumerate(bundle.manifest.taps):
        for width, entry in enumerate(tap.widths):
            widest = width + 1 == len(tap.widths)
            name = OURS if index == 0 and widest else f"{OURS} {tap.name}" + ("" if widest else f" {entry.width:g}")
            for rate in range(len(entry.rates)):
                yield own_way(bundle, head, tail, name, (index, width, rate))


def uncapped(bundle: Bundle, tap: int) -> ContextualCodec:
    """A tap's codec without its cap, so that every rate is measured on every photo."""
    capped = bundle.codec(tap)
    return ContextualCodec(capped.tables, capped.shape_CHW, 1 << 20)


def own_way(bundle: Bundle, head: Head, tail: Tail | GraphTail, name: str, where: tuple[int, int, int]) -> Way:
    tap, width, rate = where
    after = bundle.manifest.architecture.taps[tap].after
    codec = uncapped(bundle, tap)

    def encode(photo: Photo) -> bytes:
        x_CHW = photo.pixels_CHW
        for index in range(after):
            x_CHW, _ = head.segment(index, x_CHW)
        return codec.encode(codec.quantise(head.encode(tap, x_CHW, width), rate), rate)

    segments = bundle.manifest.segments[:after]
    macs = bundle.manifest.taps[tap].widths[width].encoder_macs + sum(segment.macs for segment in segments)
    return Way(
        name, f"rate {rate}", encoder_bits(bundle, tap), macs, Codec.BOTTLENECK, tap, rate,
        encode=encode,
        decode=lambda data: codec.dequantise(codec.decode(data, rate), rate),
        answer=lambda latent_CHW: tail.answer_latents(tap, [latent_CHW], [rate])[0],
    )  # fmt: skip


def trained_way(baseline: Baseline | SingleRate) -> Way:
    """A bottleneck of others, or ours with one rate. On our wire as if it were a bundle's first tap and rate.

    Its encoder runs in PyTorch, a bundle's in ONNX Runtime: between the two, compare operations rather than times.
    """
    return Way(
        baseline.method, baseline.setting, baseline.encoder_bits, baseline.encoder_macs, Codec.BOTTLENECK, 0, 0,
        encode=lambda photo: baseline.encode(torch.from_numpy(photo.pixels_CHW)[None])[0],
        decode=None,
        answer=lambda data: baseline.answer([data])[0],
    )  # fmt: skip


def trained(work: Path, method: str, bundle: Bundle) -> Sequence[Baseline | SingleRate]:
    """Finished runs of a method under `work`. Raises InvalidInput when a setting is missing."""
    from isthmus.models.recipes.vision import baselines, single

    split = load_split(bundle)
    if method == single.METHOD:
        return single.trained(work, split, bundle.manifest.architecture.taps[0])
    return baselines.trained(work, [method], split)


def encoder_bits(bundle: Bundle, tap: int) -> int:
    """Size of what a device holds to use a tap, as SC2 counts a state dict: bits of each array's type.

    All widths share one graph, so each counts whole. A tap after segments counts their graphs too, which
    include their exits. Integer tables count like CompressAI's buffers of cumulative frequencies.
    """
    entry, built = bundle.manifest.taps[tap], bundle.manifest.architecture.taps[tap]
    files = [*bundle.manifest.heads["fp32"].files[: built.after], entry.encoder]
    graphs = [onnx.load_from_string(bundle.read(name)).graph for name in files]
    arrays = bundle.tensors(entry.tables).values()
    return sum(graph_bits(graph) for graph in graphs) + sum(8 * array.nbytes for array in arrays)


def graph_bits(graph: onnx.GraphProto) -> int:
    """Bits of a graph's initializers and constants, those of its subgraphs included."""
    bits = sum(tensor_bits(tensor) for tensor in graph.initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        bits += sum(tensor_bits(tensor) for tensor in present(attribute, "t", "tensors"))
        bits += sum(graph_bits(inner) for inner in present(attribute, "g", "graphs"))
    return bits


def present(attribute: onnx.AttributeProto, one: str, several: str) -> Iterable[Any]:
    return [*([getattr(attribute, one)] if attribute.HasField(one) else ()), *getattr(attribute, several)]


def tensor_bits(tensor: onnx.TensorProto) -> int:
    return 8 * int(
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * np.prod(tensor.dims, dtype=np.int64)
    )
