"""Where the channels of a graph's values are: second as in (B, C, H, W), or last as in (B, H, W, C) and (B, N, D).

A graph does not say. Convolutions and linear layers do, and other operations move the axis or leave it where it is.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

SECOND = {"conv2d", "convolution", "_convolution", "batch_norm", "_native_batch_norm_legit_no_training", "max_pool2d"}
SECOND |= {"adaptive_avg_pool2d", "avg_pool2d", "group_norm", "pixel_shuffle"}
LAST = {"linear", "layer_norm"}


def channel_axes(graph: GraphModule) -> dict[Node, int | None]:
    """The axis of the channels of every value; None where it is not known."""
    axes: dict[Node, int | None] = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op in ("placeholder", "call_function"):
            axes[node] = 1 if node.op == "placeholder" else axis_of(node, value, axes)
    return axes


def axis_of(node: Node, value: Tensor, axes: dict[Node, int | None]) -> int | None:
    """The axis of the channels of one operation's result; None where it is not known."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.removeprefix("aten::") if schema is not None else ""
    if name in SECOND:
        return 1
    if name in LAST:
        return value.ndim - 1
    known = [(axes[each], each.meta["val"]) for each in node.all_input_nodes if axes.get(each) is not None]
    if not known:
        return None
    axis, source = known[0]
    assert axis is not None
    if name == "permute":
        dims: list[int] = [dim % source.ndim for dim in node.args[1]]  # type: ignore[union-attr]
        return dims.index(axis)
    if name == "transpose":
        first, second = (int(dim) % source.ndim for dim in node.args[1:3])  # type: ignore[arg-type]
        swapped: int = {first: second, second: first}.get(axis, axis)
        return swapped
    if value.ndim == source.ndim and value.shape[axis] == source.shape[axis]:
        return axis
    if axis == source.ndim - 1 and value.shape[-1] == source.shape[-1]:
        return value.ndim - 1
    return axis if axis < value.ndim and value.shape[axis] == source.shape[axis] else None
