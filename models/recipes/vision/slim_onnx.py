"""A slimmable encoder as one ONNX graph: int8 weights once, float16 scales and biases a width, an `If` over the width.

    x float32 (1, 3, H, W), width int64 () -> latent float32 (1, C, h, w)

ONNX Runtime runs the selected branch only. PyTorch's exporter is not used: it would store the weights once for each
width, and trace the padding as a thousand nodes of shape arithmetic.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from isthmus.models.vision.efficientnet_lite import same_padding
from isthmus.models.vision.slim import FrozenBlock, FrozenConv, FrozenSlim, SlimEncoder

OPSET = 17
IR_VERSION = 9


def slim_onnx(encoder: SlimEncoder, image_CHW: tuple[int, int, int], latent_CHW: tuple[int, int, int]) -> bytes:
    """The graph of an encoder in eval mode."""
    frozen = FrozenSlim(encoder)
    shared = [numpy_helper.from_array(value, name) for name, value in constants(frozen).items()]
    graphs = [branch(frozen, width, image_CHW, latent_CHW) for width in range(frozen.widths)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *image_CHW]),
        helper.make_tensor_value_info("width", TensorProto.INT64, []),
    ]
    outputs = [helper.make_tensor_value_info("latent", TensorProto.FLOAT, [1, *latent_CHW])]
    graph = helper.make_graph(choose(graphs, 0, "latent"), "slim_encoder", inputs, outputs, shared)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def choose(graphs: list[GraphProto], width: int, output: str) -> list[NodeProto]:
    """Nodes that give `output` from the branch of the width asked for; the widest answers for every larger number."""
    if width + 1 == len(graphs):
        return [*graphs[-1].node, helper.make_node("Identity", [graphs[-1].output[0].name], [output])]
    rest = choose(graphs, width + 1, f"{output}_")
    shape = graphs[0].output[0].type
    otherwise = helper.make_graph(rest, f"beyond{width}", [], [onnx.ValueInfoProto(name=f"{output}_", type=shape)])
    number = helper.make_node("Constant", [], [f"number{width}"], value_int=width)
    equal = helper.make_node("Equal", ["width", f"number{width}"], [f"is{width}"])
    pick = helper.make_node("If", [f"is{width}"], [output], then_branch=graphs[width], else_branch=otherwise)
    return [number, equal, pick]


def constants(frozen: FrozenSlim) -> dict[str, NDArray[np.generic]]:
    """Everything the branches share: the module's buffers, and the bounds of ReLU6 and of slices."""
    stored = {short(name): tensor.numpy() for name, tensor in frozen.state_dict().items()}
    sizes = {n for module in frozen.modules() if isinstance(module, FrozenConv) for n in module.weight.shape[:2]}
    sizes |= {n for module in frozen.modules() if isinstance(module, FrozenConv) for n in module.channels}
    bounds = {f"n{size}": np.array([size], np.int64) for size in sorted(sizes)}
    scalars = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    axes = {"axis0": np.array([0], np.int64), "axis1": np.array([1], np.int64), "n0": np.array([0], np.int64)}
    column = {"column": np.array([-1, 1, 1, 1], np.int64)}
    return {**stored, **bounds, **scalars, **axes, **column}


def branch(
    frozen: FrozenSlim, width: int, image_CHW: tuple[int, int, int], latent_CHW: tuple[int, int, int]
) -> GraphProto:
    """The encoder at one width."""
    nodes: list[NodeProto] = []
    value, (channels, *size) = "x", image_CHW
    for index, block in enumerate(frozen.blocks):
        assert isinstance(block, FrozenBlock)
        entry = value
        for number, conv in enumerate(block.convs):
            assert isinstance(conv, FrozenConv)
            name = short(f"blocks.{index}.convs.{number}")
            value = convolution(nodes, name, conv, width, value, channels, (size[0], size[1]))
            size = [-(-side // conv.stride) for side in size]
            channels = conv.channels[width]
        if block.residual:
            nodes.append(helper.make_node("Add", [entry, value], [f"w{width}.{index}"]))
            value = f"w{width}.{index}"
    output = helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, *latent_CHW])
    return helper.make_graph(nodes, f"width{width}", [], [output])


def short(name: str) -> str:
    """Name of a module or buffer in the graph: three branches name everything, and names outweigh small tensors."""
    for long, brief in (("blocks.", ""), ("convs.", ""), ("weight", "w"), ("scale", "s"), ("bias", "b")):
        name = name.replace(long, brief)
    return name


def convolution(
    nodes: list[NodeProto], name: str, conv: FrozenConv, width: int, x: str, channels: int, size: tuple[int, int]
) -> str:
    """Append the nodes of one convolution; returns the name of its output."""
    own = f"w{width}.{name}"
    outputs, inputs = conv.channels[width], 1 if conv.depthwise else channels
    (top, bottom), (left, right) = (same_padding(side, conv.weight.shape[-1], conv.stride) for side in size)
    retained = f"{name}.w"
    for axis, count in enumerate((outputs, inputs)):
        if count < conv.weight.shape[axis]:
            nodes.append(helper.make_node("Slice", [retained, "n0", f"n{count}", f"axis{axis}"], [f"{own}.{axis}"]))
            retained = f"{own}.{axis}"
    nodes += [
        helper.make_node("Cast", [retained], [f"{own}.f"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [f"{name}.s{width}"], [f"{own}.s"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", [f"{own}.s", "column"], [f"{own}.c"]),
        helper.make_node("Mul", [f"{own}.f", f"{own}.c"], [f"{own}.w"]),
        helper.make_node("Cast", [f"{name}.b{width}"], [f"{own}.b"], to=TensorProto.FLOAT),
        helper.make_node(
            "Conv",
            [x, f"{own}.w", f"{own}.b"],
            [f"{own}.y"],
            strides=[conv.stride] * 2,
            pads=[top, left, bottom, right],
            group=channels if conv.depthwise else 1,
        ),
    ]
    if not conv.act:
        return f"{own}.y"
    nodes.append(helper.make_node("Clip", [f"{own}.y", "zero", "six"], [f"{own}.a"]))
    return f"{own}.a"
