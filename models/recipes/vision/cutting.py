"""Any image classifier as a sequence of blocks: its graph, cut where it passes through a single feature map.

    module --torch.export--> operations in order --cuts--> block | block | block

Operations carry the path of their module, so a cut is named after the module that ends there; a second call of the
module gives `name:2`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from isthmus.models.errors import InvalidInput

REPEATS = 5
MAX_BATCH = 1024
SIZE = torch.ops.aten.sym_size.int

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Cut:
    """A point in the graph that only one feature map passes: the module that ends there, and the cost up to there."""

    name: str
    shape: Shape  # channels, height, width
    macs: int  # multiply-accumulate operations of one image
    seconds: float  # of one image, median

    @property
    def values(self) -> int:
        """Values of the feature map."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Captured:
    """A classifier's graph for one image size and any batch, its possible cuts, and its total cost."""

    graph: GraphModule
    cuts: tuple[Cut, ...]
    ends: tuple[Node, ...]  # the feature map of each cut
    classes: int
    macs: int
    seconds: float


def capture(model: nn.Module, image_CHW: Shape) -> Captured:
    """The graph of a classifier in eval mode, and its cuts from the image to the logits.

    Raises InvalidInput when `torch.export` fails, the output is not logits_BK, or there is no possible cut.
    """
    images_B3HW = torch.zeros(2, *image_CHW)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        program = torch.export.export(model.eval(), (images_B3HW,), dynamic_shapes=({0: batch},))
        graph = without_mutation(program.module(check_guards=False))
        with torch.inference_mode():
            logits = graph(images_B3HW)
    except Exception as error:  # any, from the user's code
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidInput(f"the model's graph cannot be captured: {reason[:300]}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInput(f"the model's output for two images is {found}, expected logits of shape (2, classes)")
    profile = Profile(graph)
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            profile.run(images_B3HW[:1])
    return cuts_of(graph, profile, logits.shape[1])


def cuts_of(graph: GraphModule, profile: Profile, classes: int) -> Captured:
    """Every point that only one feature map passes, unless the next operation is its normalisation or activation."""
    nodes = operations(graph)
    cuts: list[Cut] = []
    ends: list[Node] = []
    macs, seconds = 0, 0.0
    for index, (node, after) in enumerate(zip(nodes, [*nodes[1:], None], strict=True)):
        macs += profile.macs[node]
        seconds += statistics.median(profile.seconds[node][1:])  # the first run allocates
        if after is not None and is_only_live(nodes, index) and not (profile.macs[after] == 0 and same(node, after)):
            channels, height, width = node.meta["val"].shape[1:]
            name = name_of(node, after)
            taken = sum(cut.name.partition(":")[0] == name for cut in cuts)
            cuts.append(Cut(f"{name}:{taken + 1}" if taken else name, (channels, height, width), macs, seconds))
            ends.append(node)
    if not cuts:
        raise InvalidInput(
            "the model cannot be cut: no point of it is passed by a single feature map (B, C, H, W) only"
        )
    return Captured(graph, tuple(cuts), tuple(ends), classes, macs, seconds)


class Profile(Interpreter):
    """Runs a graph and records operations and time of every node."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.macs: dict[Node, int] = {}
        self.seconds: dict[Node, list[float]] = defaultdict(list)

    def run_node(self, n: Node) -> Any:
        started_s = time.perf_counter()
        if n in self.macs:
            result = super().run_node(n)
        else:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            self.macs[n] = int(counter.get_total_flops()) // 2
        self.seconds[n].append(time.perf_counter() - started_s)
        return result


def cut_indices(captured: Captured, names: Sequence[str]) -> list[int]:
    """Indices of cuts by name. Raises InvalidInput for an unknown name, or names out of the model's order."""
    known = [cut.name for cut in captured.cuts]
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"there is no cut {unknown[0]!r}, there are {', '.join(known)}")
    found = [known.index(name) for name in names]
    if found != sorted(set(found)):
        raise InvalidInput(f"cuts {', '.join(names)} are not in the order of the model: {', '.join(known)}")
    return found


def blocks(captured: Captured, names: Sequence[str]) -> nn.Sequential:
    """The classifier in len(names) + 1 blocks, which share the graph's weights. Raises InvalidInput."""
    ends = [captured.ends[index] for index in cut_indices(captured, names)]
    nodes = list(captured.graph.graph.nodes)
    (source,) = (node for node in nodes if node.op == "placeholder")
    (output,) = (node for node in nodes if node.op == "output")
    (last,) = output.all_input_nodes
    crossing = [source, *ends, last]
    return nn.Sequential(*(block(captured.graph, start, end) for start, end in itertools.pairwise(crossing)))


def block(whole: GraphModule, start: Node, end: Node) -> GraphModule:
    """The part of a graph that computes `end` from `start`."""
    graph, made = Graph(), {}
    made[start] = graph.placeholder("x")

    def taken(node: Node) -> Node:
        if node not in made and node.op == "get_attr":
            made[node] = graph.get_attr(str(node.target))
        elif node not in made:  # the batch size, which every feature map has
            made[node] = graph.call_function(SIZE, (made[start], 0))
        return made[node]

    inside = False
    for node in whole.graph.nodes:
        if inside and node.op == "call_function" and node.target is not SIZE:
            made[node] = graph.node_copy(node, taken)
        inside = (inside or node is start) and node is not end
    graph.output(made[end])
    return GraphModule(whole, graph)


def operations(graph: GraphModule) -> list[Node]:
    """The nodes that compute something, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is not SIZE]


def is_only_live(nodes: Sequence[Node], index: int) -> bool:
    """Whether later operations use only this one's result, a feature map, of all results so far."""
    later = set(nodes[index + 1 :])
    live = [node for node in nodes[: index + 1] if later & node.users.keys()]
    images = nodes[0].graph.find_nodes(op="placeholder")
    value = nodes[index].meta["val"]
    is_map = isinstance(value, Tensor) and value.ndim == 4
    return is_map and live == [nodes[index]] and not any(later & image.users.keys() for image in images)


def same(node: Node, after: Node) -> bool:
    """Whether an operation keeps its input's shape: a normalisation, an activation."""
    value = after.meta["val"]
    return isinstance(value, Tensor) and value.shape == node.meta["val"].shape


def name_of(node: Node, after: Node) -> str:
    """The outermost module that ends between two operations; the operation's own name when none does."""
    inner, outer = path_of(node), path_of(after)
    for depth in range(1, len(inner) + 1):
        if inner[:depth] != outer[:depth]:
            return ".".join(inner[:depth])
    return node.name


def path_of(node: Node) -> list[str]:
    """Module path of an operation."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path: str = list(stack.values())[-1][0]
    return path.split(".") if path else []


def without_mutation(graph: GraphModule) -> GraphModule:
    """Replace in-place operations by functional ones: a block must not change its input."""
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in operations(graph):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        name = schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        if not name.endswith("_") or overload is None:
            raise InvalidInput(f"the operation {schema.name} changes its input, and its functional form is unknown")
        for user in list(node.all_input_nodes[0].users):
            if order[user] > order[node]:
                user.replace_input_with(node.all_input_nodes[0], node)
        node.target = overload
    graph.recompile()
    return graph
