"""A network as one graph from images to its answer; what no such graph can answer as the network does is refused.

kind      what the module returns for a batch
classify  logits (B, K)
detect    boxes (B, N, 4) as corners in pixels of the input, scores (B, N, K) in [0, 1]
segment   scores (B, K, H, W)
embed     vectors (B, D)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from isthmus.models.errors import InvalidInput
from isthmus.models.messages import TaskKind

MAX_BATCH = 1024
SIZE = torch.ops.aten.sym_size.int
PASSING = {"clone", "detach", "alias", "dropout", "contiguous", "to", "_to_copy"}  # in eval mode the value stays
PROBABILITIES = {"softmax": "softmax", "_softmax": "softmax", "special_softmax": "softmax", "sigmoid": "sigmoid"}
SAME_ANSWER = 1e-3  # of the largest logit: kernels for other batch sizes add up in another order
ONE_ROW = 1e-3  # of 1, by which a row of probabilities may miss it
DIMENSIONS: dict[TaskKind, list[int]] = {"classify": [2], "detect": [3, 3], "segment": [4], "embed": [2]}
EXPECTED: dict[TaskKind, str] = {
    "classify": "logits of shape (2, classes)",
    "detect": "boxes (2, N, 4) and scores (2, N, classes)",
    "segment": "scores (2, classes, height, width)",
    "embed": "vectors (2, size)",
}


def captured_graph(
    model: nn.Module, images_B3HW: Tensor, kind: TaskKind | None = None
) -> tuple[GraphModule, TaskKind, str | None]:
    """The graph of a network in eval mode for any batch; its kind; and the activation removed after a class's logits.

    kind: None for what the outputs' shapes say; vectors are told from logits by `embed` alone. Raises InvalidInput when
    `torch.export` fails, the outputs are not those of the kind, or they depend on the batch or on chance.
    """
    try:
        graph = flat_outputs(without_mutation(exported(model.eval(), images_B3HW)))
        with torch.inference_mode():
            outputs = graph(images_B3HW)
    except Exception as error:  # any, from the user's code
        raise InvalidInput(f"the model's graph cannot be captured: {reason_of(error)}") from error
    kind = kind or kind_of(outputs)
    check_shapes(outputs, kind)
    removed = without_activation(graph) if kind == "classify" else None
    check_answers(graph, images_B3HW, kind)
    return graph, kind, removed


def flat_outputs(graph: GraphModule) -> GraphModule:
    """The graph with a tuple of tensors as its output, whatever structure the module returned them in."""
    nodes = output_nodes(graph)
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (tuple(nodes),)
    graph.graph.set_codegen(CodeGen())
    graph.recompile()
    return graph


def output_nodes(graph: GraphModule) -> list[Node]:
    """The nodes of a graph's outputs, in order; one may come twice."""
    (output,) = graph.graph.find_nodes(op="output")
    found: list[Node] = []
    map_arg(output.args, found.append)
    return found


def kind_of(outputs: Sequence[Tensor]) -> TaskKind:
    """The kind that the shapes of a network's outputs say."""
    if len(outputs) == 2 and [each.ndim for each in outputs] == [3, 3]:
        return "detect"
    return "segment" if len(outputs) == 1 and outputs[0].ndim == 4 else "classify"


def check_shapes(outputs: Sequence[Tensor], kind: TaskKind) -> None:
    """Raise InvalidInput unless the outputs for two images are those of the kind."""
    found = ", ".join(str(tuple(each.shape)) for each in outputs)
    dimensions = [each.ndim for each in outputs]
    if dimensions != DIMENSIONS[kind]:
        raise InvalidInput(f"the model's output for two images is {found}, expected {EXPECTED[kind]}")
    if kind == "detect" and (outputs[0].shape[2] != 4 or outputs[0].shape[1] != outputs[1].shape[1]):
        raise InvalidInput(f"the model's outputs for two images are {found}, expected {EXPECTED[kind]}")
    if kind == "classify" and outputs[0].shape[1] == 1:
        raise InvalidInput(
            "the model answers with one logit, expected one for each class: return"
            " torch.cat([torch.zeros_like(x), x], 1) for a single logit x of the second of two classes"
        )


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
def check_answers(graph: GraphModule, images_B3HW: Tensor, kind: TaskKind) -> None:
    """Raise InvalidInput unless an image's answer is finite numbers that depend on this image alone."""
    noise_B3HW = torch.randn(3, *images_B3HW.shape[1:], generator=torch.Generator().manual_seed(0))
    answers = graph(noise_B3HW)
    if not all(answer.isfinite().all() for answer in answers):
        raise InvalidInput("the model's answers to noise are not finite: are its weights?")
    if not close(graph(noise_B3HW), answers):
        raise InvalidInput(
            "the model's answers to one image differ: they are random even in eval mode, as by a dropout"
        )
    try:
        each = [graph(noise_13HW) for noise_13HW in torch.split(noise_B3HW, 1)]
        alone = [torch.cat(rows) for rows in zip(*each, strict=True)]
    except Exception:  # a batch of one has no statistics
        alone = [torch.full_like(answer, torch.inf) for answer in answers]
    if not close(alone, answers):
        raise InvalidInput(
            "the model's answer to an image depends on the others of its batch, and a device has no others:"
            " are there batch norms without running statistics?"
        )
    last = answers[-1]
    if kind == "classify" and (last >= 0).all() and ((last.sum(1) - 1).abs() < ONE_ROW).all():
        raise InvalidInput("the model's answers are probabilities, which add up to 1: return logits, without a softmax")
    if kind == "detect" and not ((last >= 0) & (last <= 1)).all():
        raise InvalidInput("the model's scores are not in [0, 1]: return probabilities, as a sigmoid gives them")


def close(answers: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether answers are the same but for the order of sums."""
    return all(
        bool((a - b).abs().max() <= SAME_ANSWER * b.abs().max().clamp_min(1e-6))
        for a, b in zip(answers, others, strict=True)
    )


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
