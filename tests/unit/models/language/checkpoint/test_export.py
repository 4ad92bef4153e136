"""An exported folder is the same model, to this program and to transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner, Result

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint import export as exporting
from isthmus.models.language.checkpoint import tokenizer_format
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.cli import main
from isthmus.models.language.checkpoint.export import DType, converted, export
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.checkpoint.weights import tensor_shapes
from isthmus.models.language.torch.batch_invariance import chunks, run_tokens
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import Sampling
from tests.bench.tiny_llama import write_tiny_gguf, write_tiny_llama
from tests.unit.models.language.checkpoint.comparison import LLAMA3, state_dict

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tied": False},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256},
    "qwen2": {"kind": "qwen2", "tied": False},
    "qwen3": {"kind": "qwen3", "head_dim": 32},
    "pieces": {"vocab": "pieces"},
}
TEXT = "The isthmus of Corinth, 世界, 2 + 2\n"
TALK = [Message("user", "What is 2 + 2?")]


def write(source: Path, folder: Path, dtype: DType = "float32") -> Checkpoint:
    export(Checkpoint.open(source), folder, dtype, lambda count: None)
    return Checkpoint.open(folder)


def greedy(checkpoint: Checkpoint, ids: list[int], count: int) -> list[int]:
    """By the cloud's decoder."""
    decoder, ids = Decoder.load(checkpoint, torch.float32), list(ids)
    for _ in range(count):
        logits_NV = run_tokens(decoder, ids, chunks(len(ids), decoder.width))
        ids.append(int(logits_NV[-1].argmax()))
    return ids[-count:]


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


# The same model


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_written_as_it_was(transformers: Any, tmp_path: Path, name: str) -> None:
    source = Checkpoint.open(write_tiny_llama(tmp_path / "source", **MODELS[name]))
    written = write(tmp_path / "source", tmp_path / "written")
    assert written.config == source.config
    assert written.fingerprint == source.fingerprint  # every weight, bit for bit
    expected = state_dict(transformers, tmp_path / "written")
    for tensor in tensor_shapes(source.config):
        np.testing.assert_array_equal(source.tensor(tensor), expected[tensor], err_msg=tensor)
    ids = torch.tensor([[1, 7, 3, 9, 4]])
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / at) for at in ("source", "written")]
    answers = [model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0] for model in models]
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize("vocab", ["bytes", "pieces"])
def test_a_gguf_file_becomes_a_folder_with_the_same_answers(transformers: Any, tmp_path: Path, vocab: Any) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", write_tiny_llama(tmp_path / "tiny", vocab=vocab))
    source, written = Checkpoint.open(tmp_path / "tiny.gguf"), write(tmp_path / "tiny.gguf", tmp_path / "written")
    for name in tensor_shapes(source.config):
        np.testing.assert_array_equal(source.tensor(name), written.tensor(name), err_msg=name)
    ids = source.tokenizer.encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    model.generation_config.eos_token_id = None
    answer = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert answer[0, len(ids) :].tolist() == greedy(source, ids, 6) == greedy(written, ids, 6)


@pytest.mark.parametrize("vocab", ["bytes", "pieces"])
def test_the_tokenizer_of_a_gguf_file_gives_the_same_ids(transformers: Any, tmp_path: Path, vocab: Any) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", write_tiny_llama(tmp_path / "tiny", vocab=vocab))
    source = Checkpoint.open(tmp_path / "tiny.gguf").tokenizer
    written = write(tmp_path / "tiny.gguf", tmp_path / "written").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    assert source.encode(TEXT) == written.encode(TEXT) == theirs(TEXT).input_ids
    assert source.vocabulary == written.vocabulary and source.eos_ids == written.eos_ids
    assert source.decode(source.encode(TEXT)) == written.decode(source.encode(TEXT))
    if source.has_template:
        talk = [{"role": "user", "content": TALK[0].content}]
        chat = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert source.chat(TALK) == written.chat(TALK) == chat


def test_smollm2_keeps_the_fingerprint_of_its_tokenizer(tmp_path: Path) -> None:
    """A device with the package and a service with the folder hold the same tokenizer."""
    source = Checkpoint.open("smollm2")
    exporting.write_texts(tmp_path, source, "float32")
    written = Tokenizer.open(tmp_path)
    assert written.fingerprint == source.tokenizer.fingerprint
    assert written.sampling == source.sampling == Sampling(0.2, 0.9)


def test_a_token_that_stands_for_no_text_is_left_out(tmp_path: Path) -> None:
    whole = Checkpoint.open(write_tiny_llama(tmp_path / "source")).tokenizer
    header, backend = tokenizer_format.unpack(whole.to_bytes())
    less = Tokenizer.from_bytes(tokenizer_format.pack(header.model_copy(update={"unused": [258]}), backend))
    (tmp_path / "source" / "tokenizer.json").write_text(
        exporting.tokenizer_json(*tokenizer_format.unpack(less.to_bytes())), encoding="utf-8"
    )
    written = Tokenizer.open(tmp_path / "source")
    assert written.vocabulary == less.vocabulary != whole.vocabulary
    assert written.size == 258


@pytest.mark.parametrize(
    "stated", [{}, {"do_sample": False}, {"temperature": 0.6, "top_p": 0.95}, {"eos_token_id": [5]}]
)
def test_recommended_sampling_and_ends_are_kept(tmp_path: Path, stated: dict[str, Any]) -> None:
    folder = write_tiny_llama(tmp_path / "source")
    (folder / "generation_config.json").write_text(json.dumps(stated))
    source, written = Checkpoint.open(folder), write(folder, tmp_path / "written")
    assert written.sampling == source.sampling
    assert written.tokenizer.eos_ids == source.tokenizer.eos_ids


# Types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_as_pytorch_rounds_them(transformers: Any, tmp_path: Path, dtype: DType) -> None:
    source = Checkpoint.open(write_tiny_llama(tmp_path / "source"))
    written = write(tmp_path / "source", tmp_path / "written", dtype)
    for name in tensor_shapes(source.config):
        rounded = torch.from_numpy(source.tensor(name)).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(written.tensor(name), rounded, err_msg=name)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_weight_that_would_become_infinite_is_refused(dtype: DType) -> None:
    limit = np.float32(exporting.ROUND_TO_INFINITY[dtype])
    values = np.array([-np.nextafter(limit, np.float32(0)), 0], np.float32)
    assert torch.from_numpy(values).to(getattr(torch, dtype)).isfinite().all()
    converted(values, dtype, "tensor")
    with pytest.raises(BundleError, match=rf"tensor holds .*, which {dtype} cannot hold"):
        converted(np.array([-limit, 0], np.float32), dtype, "tensor")
    assert torch.tensor([-limit]).to(getattr(torch, dtype)).isinf().all()


# The folder


def test_an_existing_folder_is_never_written_to(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(InvalidInput, match=r"source exists; nothing is replaced, name a new folder"):
        write(source, source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="exists"):
        write(source, tmp_path / "link")


def test_nothing_is_left_by_a_failure(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        BundleError, match=r"source: tensor model\.norm\.weight holds 100000, which float16 cannot hold"
    ):
        write(source, tmp_path / "written", "float16")
    assert os.listdir(tmp_path) == ["source"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"file/written: cannot be written: "):
        write(write_tiny_llama(tmp_path / "source"), tmp_path / "file" / "written")


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    source, told = Checkpoint.open(write_tiny_llama(tmp_path / "source")), list[int]()
    export(source, tmp_path / "written", "bfloat16", told.append)
    assert sum(told) == exporting.weights_size(source.config, "bfloat16")
    assert len(told) == len(tensor_shapes(source.config))


# The command


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    done = command(source, tmp_path / "a" / "written", "--dtype", "bfloat16")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{tmp_path}/a/written: source, 20 tensors of bfloat16, ")
    result = json.loads(command(source, tmp_path / "b", "--json").stdout)
    assert result == {
        "name": "source",
        "folder": str(tmp_path / "b"),
        "dtype": "float32",
        "tensors": 20,
        "bytes": sum(file.stat().st_size for file in (tmp_path / "b").iterdir()),
        "tokenizer": Checkpoint.open(tmp_path / "b").tokenizer.fingerprint.hex(),
    }


def test_the_command_ends_with_one_line_and_code_1(tmp_path: Path) -> None:
    for words in ((tmp_path / "nothing", tmp_path / "a"), (write_tiny_llama(tmp_path / "b"), tmp_path / "b")):
        done = command(*words)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
