"""Write a checkpoint as a Hugging Face folder, which vLLM, SGLang, transformers and this program open.

    LlamaConfig ──> config.json         Tokenizer ──> tokenizer.json, tokenizer_config.json, generation_config.json
    tensors, one after the other ──> model.safetensors: bytes of the header (8), header as JSON, tensors

The mirror image of `huggingface`, `Tokenizer.open` and `generation`. Memory holds one tensor at a time, where the
safetensors library takes all of them. Knows nothing about who runs the model.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.architecture import LinearScaling, LlamaConfig
from isthmus.models.language.checkpoint import generation, huggingface, tokenizer_format
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.tokenizer import JSON, Tokenizer, first_ids
from isthmus.models.language.checkpoint.tokenizer_format import Header, StoredSampling
from isthmus.models.language.checkpoint.weights import tensor_shapes

DType = Literal["float32", "bfloat16", "float16"]
STORED: dict[DType, tuple[str, int]] = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
ROUND_TO_INFINITY: dict[DType, float] = {"float32": math.inf, "bfloat16": 255.5 * 2.0**120, "float16": 65_520.0}


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder that was written. `tokenizer`: the fingerprint by which a service declares it, hexadecimal."""

    name: str
    folder: str
    dtype: DType
    tensors: int
    bytes: int
    tokenizer: str


def export(checkpoint: Checkpoint, folder: Path, dtype: DType, advance: Callable[[int], None]) -> Exported:
    """Write `folder` in one step; nothing is left there when it fails. `advance` is told the bytes of each tensor.

    Raises InvalidInput where `folder` exists or cannot be written; BundleError for a weight that `dtype` cannot hold,
    and for a tokenizer that would not give the same ids.
    """
    target = Path(os.path.abspath(folder))
    refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            partial = Path(scratch) / target.name
            partial.mkdir()
            write_texts(partial, checkpoint, dtype)
            with (partial / huggingface.WEIGHTS).open("xb") as file:
                write_weights(file, checkpoint, dtype, advance)
            tokenizer = check_same(Checkpoint.open(partial), checkpoint)
            refuse_existing(target)  # again: a large model takes minutes
            partial.rename(target)
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be written: {error.strerror}") from error
    size = sum(file.stat().st_size for file in target.iterdir())
    count = len(tensor_shapes(checkpoint.config))
    return Exported(checkpoint.name, str(folder), dtype, count, size, tokenizer.fingerprint.hex())


def weights_size(config: LlamaConfig, dtype: DType) -> int:
    """Bytes of every tensor together."""
    return sum(map(math.prod, tensor_shapes(config).values())) * STORED[dtype][1]


def refuse_existing(folder: Path) -> None:
    """Raises InvalidInput."""
    if os.path.lexists(folder):
        raise InvalidInput(f"{folder} exists; nothing is replaced, name a new folder")


def check_same(written: Checkpoint, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that was written. Raises BundleError where it or the configuration is not the source's."""
    found, expected = written.tokenizer, checkpoint.tokenizer
    if written.config != checkpoint.config:
        raise BundleError(f"{checkpoint.name}: config.json reads as {written.config}, expected {checkpoint.config}")
    if (found.vocabulary, found.eos_ids, found.encode("")) != (
        expected.vocabulary,
        expected.eos_ids,
        expected.encode(""),
    ):
        raise BundleError(f"{checkpoint.name}: its tokenizer has ids that tokenizer.json cannot express")
    return found


def write_weights(file: BinaryIO, checkpoint: Checkpoint, dtype: DType, advance: Callable[[int], None]) -> None:
    """A safetensors file. Raises BundleError, OSError."""
    kind, width = STORED[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    shapes = tensor_shapes(checkpoint.config)
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors are aligned
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in shapes:
        data = converted(checkpoint.tensor(name), dtype, f"{checkpoint.name}: tensor {name}")
        file.write(np.ascontiguousarray(data).data)
        advance(data.nbytes)


def converted(values: NDArray[np.float32], dtype: DType, where: str) -> NDArray[Any]:
    """Rounded to the nearest, ties to even; bfloat16 as its 16 bits. Raises BundleError for what is out of range."""
    largest = max(float(values.max()), -float(values.min()))
    if largest >= ROUND_TO_INFINITY[dtype]:
        raise BundleError(f"{where} holds {largest:g}, which {dtype} cannot hold")
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def write_texts(folder: Path, checkpoint: Checkpoint, dtype: DType) -> None:
    """Every file but the weights. Raises BundleError, OSError."""
    header, backend = tokenizer_format.unpack(checkpoint.tokenizer.to_bytes())
    config = checkpoint.config
    ids = {"bos_token_id": next(iter(header.bos), None), "eos_token_id": header.eos or None}
    (folder / JSON).write_text(tokenizer_json(header, backend), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_settings(header, backend, config.context))
    write_json(folder / generation.FILE, {**ids, **sampling_settings(header.sampling)})
    write_json(folder / "config.json", {**model_settings(config), **ids, "dtype": dtype, "torch_dtype": dtype})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def model_settings(config: LlamaConfig) -> dict[str, Any]:
    """Of config.json, for transformers 4 and 5: the latter has all about rotary embeddings in `rope_parameters`."""
    name, kind = "LlamaForCausalLM", "llama"
    if config.qkv_bias or config.qk_norm:
        name, kind = ("Qwen2ForCausalLM", "qwen2") if config.qkv_bias else ("Qwen3ForCausalLM", "qwen3")
    rope = rope_settings(config)
    return {
        "architectures": [name],
        "model_type": kind,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        **({"rope_scaling": rope} if config.rope_scaling else {}),
    }


def rope_settings(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "rope_theta": config.rope_theta, "factor": scaling.factor}
    numbers = asdict(scaling)
    original = numbers.pop("original_context")
    return {
        "rope_type": "llama3",
        "rope_theta": config.rope_theta,
        **numbers,
        "original_max_position_embeddings": original,
    }


def tokenizer_json(header: Header, backend: tokenizers.Tokenizer) -> str:
    """The library's file, which says by itself what comes before a text; ids that stand for no text are left out."""
    if first_ids(backend) != header.bos:
        first = [(backend.id_to_token(id), id) for id in header.bos]
        names = [token for token, _ in first]
        backend.post_processor = TemplateProcessing(
            single=[*names, "$A"], pair=[*names, "$A", *(f"{name}:1" for name in names), "$B:1"], special_tokens=first
        )
    if not header.unused:
        return backend.to_str()
    content = json.loads(backend.to_str())
    unused, vocabulary = set(header.unused), content["model"]["vocab"]
    content["model"]["vocab"] = {token: id for token, id in vocabulary.items() if id not in unused}
    return json.dumps(content, ensure_ascii=False)


def tokenizer_settings(header: Header, backend: tokenizers.Tokenizer, context: int) -> dict[str, Any]:
    """Of tokenizer_config.json."""
    named = {} if header.template is None else dict(header.template.tokens)
    for name, ids in (("bos_token", header.bos), ("eos_token", header.eos)):
        token = backend.id_to_token(ids[0]) if ids else None
        if token is not None:
            named.setdefault(name, token)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **named,
        **({} if header.template is None else {"chat_template": header.template.source}),
    }


def sampling_settings(sampling: StoredSampling) -> dict[str, Any]:
    """Of generation_config.json; nothing where the model's makers recommend nothing."""
    if sampling == StoredSampling(temperature=generation.UNSTATED.temperature, top_p=generation.UNSTATED.top_p):
        return {}
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
