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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.capturing import SIZE, captured_graph, operations
from isthmus.models.recipes.vision.layout import channels_last

REPEATS = 5
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # (B, C, H, W) -> (B, H, W, C), and back

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
    turned: frozenset[Node]  # of the ends, those whose channels are last: they cross a cut as (B, C, H, W)
    removed: str | None = None  # softmax or sigmoid, after the logits


def capture(model: nn.Module, image_CHW: Shape) -> Captured:
    """The graph of a classifier in eval mode, and its cuts from the image to the logits.

    Raises InvalidInput when it cannot be captured (`capturing.captured_graph`), or there is no possible cut.
    """
    images_B3HW = torch.zeros(2, *image_CHW)
    graph, removed = captured_graph(model, images_B3HW)
    profile = Profile(graph)
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            profile.run(images_B3HW[:1])
    (output,) = graph.graph.find_nodes(op="output")
    (last,) = output.all_input_nodes
    return replace(cuts_of(graph, profile, int(last.meta["val"].shape[1])), removed=removed)


def cuts_of(graph: GraphModule, profile: Profile, classes: int) -> Captured:
    """Every point that only one feature map passes, unless the next operation is its normalisation or activation."""
    nodes = operations(graph)
    turned = channels_last(graph)
    cuts: list[Cut] = []
    ends: list[Node] = []
    macs, seconds = 0, 0.0
    for index, (node, after) in enumerate(zip(nodes, [*nodes[1:], None], strict=True)):
        macs += profile.macs[node]
        seconds += statistics.median(profile.seconds[node][1:])  # the first run allocates
        if after is not None and is_only_live(nodes, index) and not (profile.macs[after] == 0 and same(node, after)):
            channels, height, width = node.meta["val"].shape[1:]
            if node in turned:
                channels, height, width = width, channels, height
            name = name_of(node, after)
            taken = sum(cut.name.partition(":")[0] == name for cut in cuts)
            cuts.append(Cut(f"{name}:{taken + 1}" if taken else name, (channels, height, width), macs, seconds))
            ends.append(node)
    if not cuts:
        raise InvalidInput(
            "the model cannot be cut: no point of it is passed by a single feature map (B, C, H, W) only"
        )
    return Captured(graph, tuple(cuts), tuple(ends), classes, macs, seconds, turned & set(ends))


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
    return nn.Sequential(*(block(captured, start, end) for start, end in itertools.pairwise(crossing)))


def block(captured: Captured, start: Node, end: Node) -> GraphModule:
    """The part of a graph that computes `end` from `start`."""
    whole, graph, made = captured.graph, Graph(), {}
    made[start] = graph.placeholder("x")
    if start in captured.turned:
        made[start] = turn(graph, made[start], TO_LAST)

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
    graph.output(turn(graph, made[end], TO_FIRST) if end in captured.turned else made[end])
    return GraphModule(whole, graph)


def turn(graph: Graph, node: Node, order: Sequence[int]) -> Node:
    """The node with its axes in another order, laid out anew: what follows may ask for a view."""
    turned = graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    return graph.call_function(torch.ops.aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})


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
