"""A classifier as one graph from images to logits; what no such graph can answer as the classifier does is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from isthmus.models.errors import InvalidInput

MAX_BATCH = 1024
SIZE = torch.ops.aten.sym_size.int
PASSING = {"clone", "detach", "alias", "dropout", "contiguous", "to", "_to_copy"}  # in eval mode the value stays
PROBABILITIES = {"softmax": "softmax", "_softmax": "softmax", "special_softmax": "softmax", "sigmoid": "sigmoid"}
SAME_ANSWER = 1e-3  # of the largest logit: kernels for other batch sizes add up in another order
ONE_ROW = 1e-3  # of 1, by which a row of probabilities may miss it


def captured_graph(model: nn.Module, images_B3HW: Tensor) -> tuple[GraphModule, str | None]:
    """The graph of a classifier in eval mode for any batch; and the activation that was removed after its logits.

    Raises InvalidInput when `torch.export` fails, the output is not logits_BK, or it depends on the batch or on chance.
    """
    try:
        graph = without_mutation(exported(model.eval(), images_B3HW))
        with torch.inference_mode():
            logits = graph(images_B3HW)
    except Exception as error:  # any, from the user's code
        raise InvalidInput(f"the model's graph cannot be captured: {reason_of(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInput(f"the model's output for two images is {found}, expected logits of shape (2, classes)")
    if logits.shape[1] == 1:
        raise InvalidInput(
            "the model answers with one logit, expected one for each class: return"
            " torch.cat([torch.zeros_like(x), x], 1) for a single logit x of the second of two classes"
        )
    removed = without_activation(graph)
    check_answers(graph, images_B3HW)
    return graph, removed


def exported(model: nn.Module, images_B3HW: Tensor) -> GraphModule:
    """The graph as `torch.export` runs the model; where it cannot, as it reads the model's code.

    PyTorch's fused transformer layer, which ONNX lacks, is left out of the latter.
    """
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        program = torch.export.export(model, (images_B3HW,), dynamic_shapes=shapes)
    except Exception as error:
        try:  # some models fix the batch's size when they are run, as by len(x)
            program = torch.export.export(model, (images_B3HW,), dynamic_shapes=shapes, strict=True)
        except Exception:
            raise error from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return program.module(check_guards=False)


def reason_of(error: Exception) -> str:
    """An error of the user's code or of `torch.export`, in one line."""
    text = str(error).strip()
    if "data-dependent" in text.lower():
        return "its control flow or a size depends on the values of an image, and a graph has one way for all images"
    return next(iter(text.splitlines()), type(error).__name__)[:300]


def without_activation(graph: GraphModule) -> str | None:
    """Remove a softmax or sigmoid after the logits, and name it: answers and confidences are made of logits."""
    (output,) = graph.graph.find_nodes(op="output")
    (last,) = output.all_input_nodes
    node = last
    while name_of(node) in PASSING:
        node = node.all_input_nodes[0]
    removed = PROBABILITIES.get(name_of(node))
    if removed is None or (removed == "softmax" and node.args[1] not in (1, -1)):
        return None
    output.replace_input_with(last, node.all_input_nodes[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return removed


def name_of(node: Node) -> str:
    """The ATen operation of a node; empty for other nodes."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else ""


@torch.inference_mode()
def check_answers(graph: GraphModule, images_B3HW: Tensor) -> None:
    """Raise InvalidInput unless an image's answer is finite logits that depend on this image alone."""
    noise_B3HW = torch.randn(3, *images_B3HW.shape[1:], generator=torch.Generator().manual_seed(0))
    logits_BK = graph(noise_B3HW)
    if not logits_BK.isfinite().all():
        raise InvalidInput("the model's answers to noise are not finite: are its weights?")
    if not close(graph(noise_B3HW), logits_BK):
        raise InvalidInput(
            "the model's answers to one image differ: they are random even in eval mode, as by a dropout"
        )
    try:
        alone_BK = torch.cat([graph(noise_13HW) for noise_13HW in torch.split(noise_B3HW, 1)])
    except Exception:  # a batch of one has no statistics
        alone_BK = torch.full_like(logits_BK, torch.inf)
    if not close(alone_BK, logits_BK):
        raise InvalidInput(
            "the model's answer to an image depends on the others of its batch, and a device has no others:"
            " are there batch norms without running statistics?"
        )
    if (logits_BK >= 0).all() and ((logits_BK.sum(1) - 1).abs() < ONE_ROW).all():
        raise InvalidInput("the model's answers are probabilities, which add up to 1: return logits, without a softmax")


def close(a_BK: Tensor, b_BK: Tensor) -> bool:
    return bool((a_BK - b_BK).abs().max() <= SAME_ANSWER * b_BK.abs().max().clamp_min(1e-6))


def operations(graph: GraphModule) -> list[Node]:
    """The nodes that compute something, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is not SIZE]


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
