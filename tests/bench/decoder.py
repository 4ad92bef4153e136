"""Decoding on the device: our ONNX graphs beside llama.cpp and transformers, in one run, turn by turn.

`tokens_per_s` of our 8-bit weights, `ratio_to_llamacpp`, `ratio_to_transformers` (float32), and `agreement`: on how
many tokens of real text the device's greedy choice is that of transformers in float32, with a 95 % interval.
llama.cpp is run by an interpreter that has llama-cpp-python (--llamacpp; it builds from source, so it is not among
our dependencies); without one its figures are null.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from isthmus.models.language.checkpoint.checkpoint import Checkpoint, smollm2_path
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval

TEXT = (
    "The first bridge between the two towns was made of wood, and it burned down in the year of the great fire. "
    "Forty years later an engineer from the coast drew a steel arch, and the people began to argue about its price."
)
LLAMA_CPP = """
import json, sys, time
from llama_cpp import Llama
path, ids, tokens, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
for line in sys.stdin:
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    read = time.perf_counter()
    for _ in range(tokens):
        model.eval([model.sample(temp=0.0)])
    print(json.dumps([len(ids) / (read - start), tokens / (time.perf_counter() - read)]), flush=True)
"""

Speeds = tuple[float, float]  # tokens a second: reading the prompt, decoding


def source(model: str) -> Path:
    return smollm2_path() if model == "smollm2" else Path(model)


def onnx_engine(checkpoint: Checkpoint, bits: int, threads: int, ids: list[int], tokens: int) -> Callable[[], Speeds]:
    decoder = OnnxDecoder(checkpoint, 1024, bits, threads)

    def run() -> Speeds:
        decoder.truncate(0)
        start_s = time.perf_counter()
        logits_V = decoder.extend(ids)
        read_s = time.perf_counter()
        for _ in range(tokens):
            logits_V = decoder.extend([int(logits_V.argmax())])
        return len(ids) / (read_s - start_s), tokens / (time.perf_counter() - read_s)

    return run


def transformers_model(model: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = source(model)
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    return AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=getattr(torch, dtype))


def transformers_engine(model: Any, threads: int, ids: list[int], tokens: int) -> Callable[[], Speeds]:
    import torch

    def run() -> Speeds:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            start_s = time.perf_counter()
            out = model(torch.tensor([ids]), use_cache=True)
            read_s = time.perf_counter()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return len(ids) / (read_s - start_s), tokens / (time.perf_counter() - read_s)

    return run


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, interpreter: str, model: str, threads: int, ids: list[int], tokens: int) -> None:
        arguments = [str(source(model)), json.dumps(ids), str(tokens), str(threads)]
        self._process = subprocess.Popen(
            [interpreter, "-c", LLAMA_CPP, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> Speeds:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("llama.cpp ended; is llama-cpp-python installed for that interpreter?")
        read, decoded = json.loads(line)
        return read, decoded

    def close(self) -> None:
        self._process.kill()


def agreement(checkpoint: Checkpoint, model: Any, texts: list[list[int]], threads: int) -> dict[str, Any]:
    """Of 8 and 4 bits with transformers in float32, token by token of the texts."""
    import torch

    same: dict[int, list[np.ndarray[Any, Any]]] = {8: [], 4: []}
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0].argmax(-1).numpy() for ids in texts]
    for bits, rows in same.items():
        decoder = OnnxDecoder(checkpoint, 1024, bits, threads)
        for ids, choice_N in zip(texts, expected, strict=True):
            decoder.truncate(0)
            rows.append(decoder.extend_all(ids).argmax(-1) == choice_N)
    return {f"{bits}-bit": interval(np.concatenate(rows)).model_dump() for bits, rows in same.items()}


def ratio(speeds: dict[str, list[Speeds]], other: str) -> float | None:
    """Median over the turns of our decoding speed over the other's."""
    pairs = zip(speeds["onnx 8-bit"], speeds.get(other, []), strict=False)
    ratios = [ours[1] / theirs[1] for ours, theirs in pairs]
    return statistics.median(ratios) if ratios else None


def passages(checkpoint: Checkpoint, file: Path | None, count: int) -> list[list[int]]:
    ids = checkpoint.tokenizer.encode(file.read_text() if file else TEXT * 4)
    return [ids[start : start + 256] for start in range(0, min(len(ids), 256 * count), 256)]


@click.command(epilog="Example: python -m tests.bench.decoder --llamacpp /opt/bin/python --json runs/decoder.json")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--llamacpp", help="A Python interpreter with llama-cpp-python.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="For the agreement; not trained on.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Decoded in each turn.")
@click.option("--turns", default=7, show_default=True)
@click.option("--quick", is_flag=True, help="Two turns of 8 tokens, one passage.")
def main(
    json_file: Path,
    llamacpp: str | None,
    model: str,
    text: Path | None,
    threads: int,
    tokens: int,
    turns: int,
    quick: bool,
) -> None:
    """Measure engines turn by turn, and print medians."""
    tokens, turns, count = (8, 2, 1) if quick else (tokens, turns, 12)
    checkpoint = Checkpoint.open(model)
    ids = checkpoint.tokenizer.encode(TEXT)
    reference = transformers_model(model, "float32")
    engines: dict[str, Callable[[], Speeds]] = {
        "onnx 8-bit": onnx_engine(checkpoint, 8, threads, ids, tokens),
        "onnx 4-bit": onnx_engine(checkpoint, 4, threads, ids, tokens),
        "transformers float32": transformers_engine(reference, threads, ids, tokens),
        "transformers bfloat16": transformers_engine(transformers_model(model, "bfloat16"), threads, ids, tokens),
    }
    if llamacpp:
        engines["llama.cpp Q4_1"] = LlamaCpp(llamacpp, model, threads, ids, tokens)
    speeds: dict[str, list[Speeds]] = {name: [] for name in engines}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            speed = engine()
            if turn:  # the first warms up
                speeds[name].append(speed)
        print(f"turn {turn} of {turns}", file=sys.stderr)
    read = {name: statistics.median(row[0] for row in rows) for name, rows in speeds.items()}
    decoded = {name: statistics.median(row[1] for row in rows) for name, rows in speeds.items()}
    result = {
        "model": checkpoint.name,
        "tokens_per_s": decoded["onnx 8-bit"],
        "ratio_to_llamacpp": ratio(speeds, "llama.cpp Q4_1"),
        "ratio_to_transformers": ratio(speeds, "transformers float32"),
        "agreement": agreement(checkpoint, reference, passages(checkpoint, text, count), threads),
        "decode_tokens_per_s": decoded,
        "prefill_tokens_per_s": read,
        "threads": threads,
        "turns": turns,
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "transformers", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
