"""Build ONNX graphs of a Llama-type model's layers with 8- or 4-bit weights, for a device without PyTorch.

    hidden (1, S, H), caches, lengths -> [norm, qkv, attention, norm, feed-forward] * layers -> hidden (1, S, H)
    hidden (1, S, H), caches, lengths -> an exit: linear map, its layers, norm -> normed hidden states (1, S, H)
    normed hidden states (S, H) -> output head -> logits (S, V)
    token ids (S,) -> embeddings (S, H)

The graph of the last layer includes the model's final norm, so that the head takes the output of layers and of exits.

Weights are blocks of 32, or as a model stores them in 4 bits around code 8, with a float32 scale each (MatMulNBits);
products are computed on 8-bit integers. Attention is
ONNX Runtime's GroupQueryAttention, which updates the caches in place. Knows nothing about running a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LlamaConfig, rope_frequencies
from isthmus.models.language.checkpoint.checkpoint import Blocks, Checkpoint
from isthmus.models.language.packing import BLOCK, Floats, in_pairs, quantise4, quantise8

HEAD_STEP = 16  # elements; GroupQueryAttention with rotary embeddings needs head sizes that are multiples of this
GRAPH_VERSION = 1  # of what this module builds of a model; graphs of another one are not opened again
MAX_GRAPH_BYTES = 1_900_000_000  # protobuf's limit is 2 GiB
ORT_DOMAIN = "com.microsoft"
INTEGER_PRODUCTS = 4  # MatMulNBits' accuracy_level: activations are quantised to 8 bits for each block


class Graph:
    """Collects the nodes and initialisers of one model."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._initialisers: list[Any] = []
        self._bytes = 0

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an initialiser and return its name. Raises BundleError when the model becomes too large."""
        self._bytes += array.nbytes
        if self._bytes > MAX_GRAPH_BYTES:
            raise BundleError(f"the model takes more than {MAX_GRAPH_BYTES} bytes, the limit of a graph")
        self._initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add one node and return the name of its first output."""
        self._nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str, name: str, weight_OI: Floats | Blocks, bits: int, bias_O: Floats | None = None) -> str:
        """Multiply x (.., I) by quantised weights and return the name of the product (.., O).

        `weight_OI`: floats, which are quantised to `bits` bits, or 4-bit blocks that are used as they are stored.
        """
        rows, columns = (weight_OI.codes_NK if isinstance(weight_OI, Blocks) else weight_OI).shape
        block = BLOCK
        if isinstance(weight_OI, Blocks):
            bits, block = 4, columns // weight_OI.scale_NG.shape[1]
            codes = in_pairs(weight_OI.codes_NK.reshape(rows, -1, block))
            inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scale", weight_OI.scale_NG)]
        elif bits == 8:
            codes, scale_OG = quantise8(weight_OI)
            inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scale", scale_OG)]
        else:
            codes, scale_OG, zero = quantise4(weight_OI)
            inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scale", scale_OG)]
            inputs.append(self.constant(f"{name}.zero", zero))
        settings = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": INTEGER_PRODUCTS}
        y = self.node("MatMulNBits", inputs, [name], ORT_DOMAIN, **settings)
        return y if bias_O is None else self.node("Add", [y, self.constant(f"{name}.bias", bias_O)], [f"{name}.sum"])

    def norm(self, x: str, name: str, weight_H: Floats, epsilon: float) -> str:
        """RMSNorm over the last axis."""
        scale = self.constant(f"{name}.weight", weight_H)
        return self.node("SimplifiedLayerNormalization", [x, scale], [name], epsilon=epsilon, axis=-1)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> ModelProto:
        graph = helper.make_graph(self._nodes, "isthmus", inputs, outputs, self._initialisers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ORT_DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class TensorSource(Protocol):
    """Tensors by their Hugging Face names: of a checkpoint, or of an exit with its own number of layers in `config`."""

    @property
    def config(self) -> LlamaConfig: ...

    def tensor(self, name: str) -> Floats: ...

    def blocks(self, name: str) -> Blocks | None: ...


def stored_matrix(source: TensorSource, *names: str) -> Floats | Blocks:
    """Matrices, one below another: their 4-bit blocks where all are stored around code 8, or else floats."""
    parts = [source.blocks(name) for name in names]
    found = [part for part in parts if part and (part.minimum_NG == -8 * part.scale_NG).all()]
    if len(found) < len(parts):
        return np.concatenate([source.tensor(name) for name in names])
    codes_NK, scale_NG, minimum_NG = (
        np.concatenate(arrays)
        for arrays in zip(*((part.codes_NK, part.scale_NG, part.minimum_NG) for part in found), strict=True)
    )
    return Blocks(codes_NK, scale_NG, minimum_NG)


def use_int8_caches(model: ModelProto, scales: Mapping[str, Floats]) -> None:
    """Turn a graph's float32 caches into ones of 8 bits: value / scale, rounded, and at most 127.

    `scales` (1, kv_heads, 1, head_dim) by the cache's name (`0.key`): one for each channel.
    """
    for tensor in (*model.graph.input, *model.graph.output):
        if tensor.name.startswith(("past.", "present.")):
            tensor.type.tensor_type.elem_type = TensorProto.INT8
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            caches = [name.removeprefix("past.") for name in node.input[3:5]]
            for cache in caches:
                model.graph.initializer.append(numpy_helper.from_array(scales[cache], f"{cache}.scale"))
            node.input.extend(["", "", "", *(f"{cache}.scale" for cache in caches)])
            node.attribute.extend(helper.make_attribute(f"{part}_quant_type", "PER_CHANNEL") for part in "kv")
            node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))


def layers_graph(checkpoint: Checkpoint, layers: range, context: int, bits: int) -> ModelProto:
    """A graph of consecutive layers; caches (1, kv_heads, context, head_dim) are inputs past.* and outputs present.*.

    Raises BundleError for sizes that ONNX Runtime's operators do not support, and for a model that is too large.
    """
    graph = Graph()
    x = add_layers(graph, checkpoint, layers, "hidden", context, bits)
    if layers.stop == checkpoint.config.layers:
        x = graph.norm(x, "norm", checkpoint.tensor("model.norm.weight"), checkpoint.config.norm_eps)
    return finished(graph, checkpoint.config, layers, x, context)


def exit_graph(exit_: TensorSource, context: int) -> ModelProto:
    """A graph of an exit's map, layers and norm, with caches as in `layers_graph` and 8-bit exit_."""
    graph, layers = Graph(), range(exit_.config.layers)
    x = graph.linear("hidden", "map", exit_.tensor("map.weight"), 8, exit_.tensor("map.bias"))
    x = add_layers(graph, exit_, layers, x, context, 8)
    x = graph.norm(x, "norm", exit_.tensor("model.norm.weight"), exit_.config.norm_eps)
    return finished(graph, exit_.config, layers, x, context)


def add_layers(graph: Graph, source: TensorSource, layers: range, x: str, context: int, bits: int) -> str:
    """Append layers to `x` and return the name of their output. Raises BundleError."""
    config = source.config
    if config.head_dim % HEAD_STEP:
        raise BundleError(f"head size is {config.head_dim}, a device needs a multiple of {HEAD_STEP}")
    angles_TD2 = np.arange(context, dtype=np.float32)[:, None] * rope_frequencies(config)
    rotation = graph.constant("cos", np.cos(angles_TD2)), graph.constant("sin", np.sin(angles_TD2))
    for index in layers:
        x = add_layer(graph, source, index, x, rotation, bits)
    return x


def finished(graph: Graph, config: LlamaConfig, layers: range, x: str, context: int) -> ModelProto:
    """The model with output `x` and the caches of its layers."""
    graph.node("Identity", [x], ["out"])
    caches = [f"{index}.{part}" for index in layers for part in ("key", "value")]
    cache_shape = [1, config.kv_heads, context, config.head_dim]
    hidden: list[int | str] = [1, "S", config.hidden]
    inputs = [value("hidden", hidden), value("last", [1], TensorProto.INT32), value("total", [], TensorProto.INT32)]
    inputs += [value(f"past.{cache}", cache_shape) for cache in caches]
    outputs = [value("out", hidden), *(value(f"present.{cache}", cache_shape) for cache in caches)]
    return graph.model(inputs, outputs)


def head_graph(checkpoint: Checkpoint) -> ModelProto:
    """The output head: normed hidden states (S, H) -> logits (S, V), as stored or in 8 bits: close logits need it."""
    config, graph = checkpoint.config, Graph()
    weight_VH = stored_matrix(checkpoint, "model.embed_tokens.weight" if config.tied else "lm_head.weight")
    graph.node("Identity", [graph.linear("hidden", "head", weight_VH, bits=8)], ["logits"])
    return graph.model([value("hidden", ["S", config.hidden])], [value("logits", ["S", config.vocab])])


def embedding_graph(checkpoint: Checkpoint) -> ModelProto:
    """Token ids (S,) -> their embeddings (S, H), which have 8 bits each."""
    graph = Graph()
    codes_VGB, scale_VG = quantise8(checkpoint.tensor("model.embed_tokens.weight"))
    codes = graph.node("Gather", [graph.constant("codes", codes_VGB), "ids"], ["chosen"])
    floats = graph.node("Cast", [codes], ["floats"], to=TensorProto.FLOAT)
    centred = graph.node("Sub", [floats, graph.constant("middle", np.array(128, np.float32))], ["centred"])
    scale = graph.node("Gather", [graph.constant("scale", scale_VG[..., None]), "ids"], ["scales"])
    blocks = graph.node("Mul", [centred, scale], ["blocks"])
    graph.node("Reshape", [blocks, graph.constant("rows", np.array([0, -1], np.int64))], ["embedded"])
    ids = value("ids", ["S"], TensorProto.INT64)
    return graph.model([ids], [value("embedded", ["S", checkpoint.config.hidden])])


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def add_layer(graph: Graph, source: TensorSource, index: int, x: str, rotation: tuple[str, str], bits: int) -> str:
    """Append one layer to `x` and return the name of its output."""
    config, prefix = source.config, f"model.layers.{index}."

    def matrix(*names: str) -> Floats | Blocks:
        return stored_matrix(source, *(f"{prefix}{name}.weight" for name in names))

    normed = graph.norm(x, f"{index}.in", source.tensor(f"{prefix}input_layernorm.weight"), config.norm_eps)
    query_key_value = add_projections(graph, source, index, normed, bits)
    mixed = graph.node(
        "GroupQueryAttention",
        [*query_key_value, f"past.{index}.key", f"past.{index}.value", "last", "total", *rotation],
        [f"{index}.mixed", f"present.{index}.key", f"present.{index}.value"],
        ORT_DOMAIN,
        num_heads=config.heads,
        kv_num_heads=config.kv_heads,
        do_rotary=1,
        scale=config.head_dim**-0.5,
    )
    out = graph.linear(mixed, f"{index}.out", matrix("self_attn.o_proj"), bits)
    x = graph.node("Add", [x, out], [f"{index}.attended"])
    post = source.tensor(f"{prefix}post_attention_layernorm.weight")
    normed = graph.norm(x, f"{index}.ffn", post, config.norm_eps)
    both = graph.linear(normed, f"{index}.gate_up", matrix("mlp.gate_proj", "mlp.up_proj"), bits)
    gate, up = f"{index}.gate", f"{index}.up"
    graph.node("Split", [both], [gate, up], axis=-1, num_outputs=2)
    active = graph.node("QuickGelu", [gate], [f"{index}.silu"], ORT_DOMAIN, alpha=1.0)  # with alpha 1 this is SiLU
    product = graph.node("Mul", [active, up], [f"{index}.product"])
    down = graph.linear(product, f"{index}.down", matrix("mlp.down_proj"), bits)
    return graph.node("Add", [x, down], [f"{index}.done"])


def add_projections(graph: Graph, source: TensorSource, index: int, x: str, bits: int) -> list[str]:
    """Query, key and value inputs of GroupQueryAttention: one packed tensor, or three with Qwen 3's norms."""
    config, prefix = source.config, f"model.layers.{index}.self_attn."
    parts = ("q", "k", "v")
    matrix = stored_matrix(source, *(f"{prefix}{part}_proj.weight" for part in parts))
    biases = [source.tensor(f"{prefix}{part}_proj.bias") for part in parts] if config.qkv_bias else None
    bias_O = np.concatenate(biases) if biases else None
    packed = graph.linear(x, f"{index}.qkv", matrix, bits, bias_O)
    if not config.qk_norm:
        return [packed, "", ""]
    names = [f"{index}.{part}" for part in parts]
    rows = [config.head_dim * heads for heads in (config.heads, config.kv_heads, config.kv_heads)]
    sizes = graph.constant(f"{index}.sizes", np.array(rows, np.int64))
    graph.node("Split", [packed, sizes], names, axis=-1)
    return [*(normed_heads(graph, source, index, part, config) for part in ("q", "k")), names[2]]


def normed_heads(graph: Graph, source: TensorSource, index: int, part: str, config: LlamaConfig) -> str:
    """RMSNorm over each head of the query or key."""
    name = f"{index}.{part}"
    weight_D = source.tensor(f"model.layers.{index}.self_attn.{part}_norm.weight")
    split = graph.constant(f"{name}.split", np.array([1, -1, config.head_dim], np.int64))
    heads = config.heads if part == "q" else config.kv_heads
    joined = graph.constant(f"{name}.joined", np.array([1, -1, heads * config.head_dim], np.int64))
    by_head = graph.node("Reshape", [name, split], [f"{name}.by_head"])
    return graph.node(
        "Reshape", [graph.norm(by_head, f"{name}.normed", weight_D, config.norm_eps), joined], [f"{name}.out"]
    )
