"""Any network for images as a sequence of blocks: its graph, cut where few values pass.

    module --torch.export--> operations in order --cuts--> block | block | block

Classifiers are cut where a single feature map or sequence of tokens passes; networks of other kinds also where maps of
several scales do, as after a detector's neck. Between blocks there is one map (`crossing`). Operations carry the path
of their module, so a cut is named after the module that ends there; a second call of the module gives `name:2`.
"""

from __future__ import annotations

import itertools
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
from isthmus.models.messages import TaskKind
from isthmus.models.recipes.vision.capturing import SIZE, captured_graph, operations, output_nodes
from isthmus.models.recipes.vision.crossing import Crossing, Layout, Pack, Shape, Unpack, layouts_of
from isthmus.models.recipes.vision.layout import channel_axes

REPEATS = 5
MOST_MAPS = 5  # of several scales at one cut
TOKENS = ("tokens", "columns")  # forms of a sequence


@dataclass(frozen=True)
class Cut:
    """A point in the graph that few values pass: the module that ends there, and the cost up to there."""

    name: str
    shape: Shape  # channels, height, width of the one map that crosses
    macs: int  # multiply-accumulate operations of one image
    seconds: float  # of one image, median
    values: int  # that cross


@dataclass(frozen=True)
class Captured:
    """A network's graph for one image size and any batch, its possible cuts, and its total cost."""

    graph: GraphModule
    cuts: tuple[Cut, ...]
    ends: tuple[tuple[Node, ...], ...]  # what crosses each cut
    layouts: tuple[tuple[Layout, ...], ...]
    kind: TaskKind
    channels: int  # of its answer: classes, or numbers of a vector
    macs: int
    seconds: float
    removed: str | None = None  # softmax or sigmoid, after the logits

    @property
    def whole(self) -> nn.Module:
        """The network: images -> its outputs, a tensor where there is one."""
        return blocks(self, ())

    def is_tokens(self, index: int) -> bool:
        """Whether a sequence of tokens crosses a cut."""
        return self.layouts[index][0].form in TOKENS


def capture(model: nn.Module, image_CHW: Shape, kind: TaskKind | None = None) -> Captured:
    """The graph of a network in eval mode, and its cuts from the image to its answer.

    kind: of the answer; None for what the shapes of its outputs say. Raises InvalidInput when it cannot be captured
    (`capturing.captured_graph`), or there is no possible cut.
    """
    images_B3HW = torch.zeros(2, *image_CHW)
    graph, kind, removed = captured_graph(model, images_B3HW, kind)
    profile = Profile(graph)
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            profile.run(images_B3HW[:1])
    last = output_nodes(graph)[-1].meta["val"]
    channels = last.shape[2 if kind == "detect" else 1]
    return replace(cuts_of(graph, profile, kind, image_CHW[1:]), channels=int(channels), removed=removed)


def cuts_of(graph: GraphModule, profile: Profile, kind: TaskKind, image: tuple[int, int]) -> Captured:
    """Every point that few values pass, unless the next operation only normalises or activates the only one."""
    nodes, axes = operations(graph), channel_axes(graph)
    lives = Lives(graph, nodes)
    cuts: list[Cut] = []
    ends: list[tuple[Node, ...]] = []
    layouts: list[tuple[Layout, ...]] = []
    macs, seconds = 0, 0.0
    for index, (node, after) in enumerate(itertools.pairwise(nodes)):
        macs += profile.macs[node]
        seconds += statistics.median(profile.seconds[node][1:])  # the first run allocates
        live = lives.at(index)
        most = 1 if kind == "classify" else MOST_MAPS
        if not macs or not 0 < len(live) <= most or (profile.macs[after] == 0 and only_changed(live, after)):
            continue
        values = [each.meta["val"] for each in live]
        found = layouts_of(values, [axes.get(each) for each in live], image)
        if found is None:
            continue
        crossing, name = Crossing(found), name_of(node, after)
        if cuts and (cuts[-1].macs, cuts[-1].values) == (macs, crossing.values):  # laid out in another way
            continue
        if found[0].form in TOKENS and name == node.name:  # between attention and perceptron of one layer
            continue
        taken = sum(cut.name.partition(":")[0] == name for cut in cuts)
        name = f"{name}:{taken + 1}" if taken else name
        cuts.append(Cut(name, crossing.shape, macs, seconds, crossing.values))
        ends.append(live)
        layouts.append(tuple(found))
    if not cuts:
        raise InvalidInput(
            "the model cannot be cut: no point of it is passed by a single feature map (B, C, H, W) or sequence of"
            " tokens (B, N, D) only"
        )
    macs, seconds = macs + profile.macs[nodes[-1]], seconds + statistics.median(profile.seconds[nodes[-1]][1:])
    return Captured(graph, tuple(cuts), tuple(ends), tuple(layouts), kind, 0, macs, seconds)


class Lives:
    """What later operations need of earlier ones, at every point of a graph."""

    def __init__(self, graph: GraphModule, nodes: Sequence[Node]) -> None:
        position = {node: index for index, node in enumerate(nodes)}
        (self._image,) = graph.graph.find_nodes(op="placeholder")
        seen = {self._image}
        for node in nodes:
            if seen & set(node.all_input_nodes):
                seen.add(node)
        self._of_image = seen - {self._image}
        self._nodes = nodes
        self._last = {
            node: max((position.get(user, len(nodes)) for user in node.users if user.target is not SIZE), default=-1)
            for node in (self._image, *nodes)
        }

    def at(self, index: int) -> tuple[Node, ...]:
        """The values of an image that cross after an operation; none where the image itself does, or no tensor."""
        if self._last[self._image] > index:
            return ()
        live = tuple(node for node in self._nodes[: index + 1] if node in self._of_image and self._last[node] > index)
        return live if all(isinstance(node.meta["val"], Tensor) for node in live) else ()


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
    """The network in len(names) + 1 blocks, which share the graph's weights. Raises InvalidInput."""
    (source,) = captured.graph.graph.find_nodes(op="placeholder")
    chosen = cut_indices(captured, names)
    crossing = [(source,), *(captured.ends[index] for index in chosen), tuple(output_nodes(captured.graph))]
    layouts = [None, *(captured.layouts[index] for index in chosen), None]
    return nn.Sequential(
        *(
            Block(section(captured.graph, start, end), before, after)
            for (start, end), (before, after) in zip(
                itertools.pairwise(crossing), itertools.pairwise(layouts), strict=True
            )
        )
    )


class Block(nn.Module):
    """A part of a graph from one cut to the next; both ends are one map, the network's own are as they are."""

    def __init__(self, graph: GraphModule, before: Sequence[Layout] | None, after: Sequence[Layout] | None) -> None:
        super().__init__()
        self.section = graph
        self.unpack = Unpack(before) if before else None
        self.pack = Pack(after) if after else None

    def forward(self, x: Tensor) -> Any:
        found = self.section(*(self.unpack(x) if self.unpack else (x,)))
        return self.pack(*found) if self.pack else found[0] if len(found) == 1 else found


def section(whole: GraphModule, starts: Sequence[Node], ends: Sequence[Node]) -> GraphModule:
    """The part of a graph that computes `ends` from `starts`, as a tuple."""
    graph, made = Graph(), dict[Node, Node]()
    for index, start in enumerate(starts):
        made[start] = graph.placeholder(f"x{index}")
    first = made[starts[0]]
    required = needed(starts, ends)

    def taken(node: Node) -> Node:
        return made[node]

    for node in whole.graph.nodes:
        if node in made or node not in required:
            continue
        if node.target is SIZE:  # of the batch, which everything that crosses has
            made[node] = graph.call_function(SIZE, (first, 0))
        elif node.op == "get_attr":
            made[node] = graph.get_attr(str(node.target))
        else:
            made[node] = graph.node_copy(node, taken)
    graph.output(tuple(made[end] for end in ends))
    return GraphModule(whole, graph)


def needed(starts: Sequence[Node], ends: Sequence[Node]) -> set[Node]:
    """The nodes that `ends` are computed from, back to `starts`; a size of the batch comes from anywhere."""
    found, waiting = set[Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node in found or node in starts:
            continue
        found.add(node)
        waiting += () if node.target is SIZE else node.all_input_nodes
    return found


def only_changed(live: Sequence[Node], after: Node) -> bool:
    """Whether the next operation takes the only value that crosses, no other does, and it keeps its shape."""
    value = after.meta["val"]
    return (
        len(live) == 1
        and set(live[0].users) == {after}
        and isinstance(value, Tensor)
        and value.shape == live[0].meta["val"].shape
    )


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
