"""The native engine on a device: is `verify` token for token `cloud`, and how fast is it with many sessions at once?

For whoever has a CUDA card, once: one real service, and as many sessions at a time as `--sessions` says. First all of
them are answered by `cloud`, for `tokens_per_s`; one by itself, for `tokens_per_s_alone`. Then each prompt is answered
by `cloud` and by `verify`, with drafts that are right, wrong and in part right, until `--total` tokens are compared.
Ends with 1 when any token differs. Every answer crosses gRPC on this machine.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import GREEDY
from tests.bench.lossless import LONGEST_TOKENS, SCRIPTED, Bench, Case
from tests.bench.processes import CloudProcess
from tests.bench.prompts import load_prompts

DRAFTS = (*SCRIPTED, "lookup")
COMPUTING = "computing on "  # how the service's log names the device


def speed(bench: Bench, prompts: Iterable[tuple[int, ...]], sessions: int) -> tuple[int, float]:
    """Tokens of one answer a session, all begun at once, and the seconds until the last one ended."""
    ready = threading.Barrier(sessions + 1)

    def answer(prompt: tuple[int, ...]) -> int:
        ready.wait()
        return len(bench.answer(prompt, None, SpeculationStats())[0])

    with ThreadPoolExecutor(sessions) as threads:
        answers = [threads.submit(answer, prompt) for prompt in itertools.islice(prompts, sessions)]
        ready.wait()
        started_s = time.monotonic()
        return sum(each.result() for each in answers), time.monotonic() - started_s


def compare(bench: Bench, prompts: Iterator[tuple[int, ...]], sessions: int, total: int) -> list[Case]:
    """Answers by both arms, `sessions` prompts at a time, until `total` tokens are compared."""
    cases: list[Case] = []
    jobs = ((index, prompt, DRAFTS[index % len(DRAFTS)]) for index, prompt in enumerate(prompts))
    lock = threading.Lock()

    def work(_: int) -> None:
        while sum(case.tokens for case in cases) < total:
            with lock:
                index, prompt, name = next(jobs)
            cases.append(bench.case(index, prompt, name, False))

    with ThreadPoolExecutor(sessions) as threads:
        list(threads.map(work, range(sessions)))
    return cases


def occupancy(cloud: CloudProcess, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `run` gives, and the forward passes meanwhile: tokens in each, and its time."""
    names = ("decoder_pass_seconds_sum", "decoder_pass_seconds_count")

    def read() -> list[float]:
        return [*(cloud.metric(name) for name in names), cloud.metric("decoder_rows_total", kind="used")]

    before = read()
    result = run()
    seconds, passes, rows = (after - earlier for after, earlier in zip(read(), before, strict=True))
    return result, {"rows_per_pass": rows / passes, "pass_ms": 1000 * seconds / passes}


def measure(cloud: CloudProcess, bench: Bench, ids: list[tuple[int, ...]], sessions: int, total: int) -> dict[str, Any]:
    speed(bench, ids, 1)  # the first passes of every kind
    alone_tokens, alone_s = speed(bench, ids, 1)
    (tokens, seconds), passes = occupancy(cloud, lambda: speed(bench, itertools.cycle(ids), sessions))
    cases = compare(bench, itertools.cycle(ids), sessions, total)
    return {
        "tokens": sum(case.tokens for case in cases),
        "mismatches": sum(case.mismatches for case in cases),
        "answers": len(cases),
        "accepted": sum(case.accepted for case in cases),
        "rejected": sum(case.rejected for case in cases),
        "sessions": sessions,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_alone": alone_tokens / alone_s,
        **passes,
    }


@click.command(epilog="Example: python -m tests.bench.device --device cuda --json runs/device.json")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="cuda", show_default=True, help="As of the service.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--width", default=16, show_default=True, help="Tokens in one forward pass.")
@click.option("--context-mb", default=2048, show_default=True)
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="Spec-Bench JSON lines, or text lines.")
@click.option("--sessions", default=16, type=click.IntRange(1), show_default=True, help="At once.")
@click.option("--tokens", default=128, type=click.IntRange(2), show_default=True, help="Of each answer, at most.")
@click.option("--total", default=10_000, type=click.IntRange(1), show_default=True, help="Tokens to compare, at least.")
def main(
    json_file: Path,
    device: str,
    model: str,
    dtype: str,
    width: int,
    context_mb: int,
    prompts: Path | None,
    sessions: int,
    tokens: int,
    total: int,
) -> None:
    """Compare `verify` with `cloud` on a device, and measure tokens a second."""
    checkpoint = Checkpoint.open(model)
    ids = load_prompts(prompts, checkpoint.tokenizer, 64, LONGEST_TOKENS)
    settings = {"model": model, "device": device, "dtype": dtype, "width": width, "context-mb": context_mb}
    arguments = tuple(word for name, value in settings.items() for word in (f"--{name}", str(value)))
    with CloudProcess(arguments=arguments) as cloud:
        bench = Bench(checkpoint, cloud.target, tokens, GREEDY, models={})
        found = measure(cloud, bench, ids, sessions, total)
        bench.replicas.close()
        lines = cloud.read_log().splitlines()
    computing = [line.partition(COMPUTING)[2] for line in lines if COMPUTING in line]
    result = {
        **settings,
        "model": checkpoint.name,
        "card": computing[0] if computing else "the CPU",
        **found,
        "max_tokens": tokens,
        "machine": f"{platform.machine()}; devices and cloud share it",
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))
    sys.exit(1 if result["mismatches"] else 0)


if __name__ == "__main__":
    main()
