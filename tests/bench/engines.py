"""The cloud's model behind an engine: what the service costs, whether `verify` is `cloud`, what a lost engine does.

    memory      of an agent, beside a small and a large model in the cloud
    speed       tokens a second and time to first token, the engine asked directly and through the service
    lossless    `verify` against `cloud`, with drafts by the model and by lookup, while the engine is killed and started

The engine is a command that serves vLLM's API at {port}; without one a scripted engine stands in, whose figures say
nothing about speed. Replicas are measured by `tests.bench.replicas`, the native engine on a GPU by
`tests.bench.torch_device`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import Sampling
from tests.bench import device_memory, engine_speed
from tests.bench.engine_process import EngineProcess, wait_described
from tests.bench.lossless import LONGEST_TOKENS, Bench, Case, Killer, finished, jobs, record, report, run
from tests.bench.processes import CloudProcess, free_port
from tests.bench.prompts import FEW, load_prompts, text_of

PARTS = ("memory", "speed", "lossless")
SCRIPTED = f"{sys.executable} -m tests.scripted_engine {{port}}"
WAIT_S = 600.0  # for an engine that was killed
DRAFTS = ("model-8bit", "lookup", "model-4bit")  # the hostile ones cost a pass of the whole text for each token


def speed(engine: EngineProcess, cloud: CloudProcess, checkpoint: Checkpoint, texts: list[str], tokens: int) -> Any:
    model = str(engine_speed.httpx.get(f"{engine.url}/v1/models", trust_env=False).json()["data"][0]["id"])
    prompts = list(engine_speed.questions(texts, checkpoint.tokenizer, LONGEST_TOKENS))
    return engine_speed.compare(engine.url, cloud.target, model, prompts, tokens)


def lossless(
    engine: EngineProcess, cloud: CloudProcess, checkpoint: Checkpoint, prompts: list[tuple[int, ...]],
    settings: dict[str, Any], partial: Path,
) -> dict[str, Any]:  # fmt: skip
    """Prompts that an interrupted run has finished are not run again."""
    cases = finished(partial, settings)
    done = {case.prompt for case in cases}
    bench = Bench(checkpoint, cloud.target, settings["max_tokens"], Sampling(), wait_s=WAIT_S)
    killer = Killer(engine, cases, len(prompts), settings["restarts"])
    killer.start()
    with Progress() as bar, partial.open("a") as log:
        task = bar.add_task("prompts", total=len(prompts), completed=len(done))

        def keep(case: Case) -> None:
            record(log, settings, case)
            bar.advance(task)

        todo = [job for job in jobs(prompts, DRAFTS) if job[0] not in done]
        run(bench, todo, settings["workers"], keep, cases)
    killer.join()
    bench.replicas.close()
    partial.unlink()
    figures = report(sorted(cases, key=lambda case: case.prompt), killer.count, settings)
    return {**figures, "lost": len(prompts) - len(cases)}


@click.command(
    epilog="Example: python -m tests.bench.engines --engine"
    " 'tests/acceptance/vllm.sh build/smollm2 {port} --dtype float32' --model build/smollm2"
    " --n 300 --tokens 64 --json runs/engines.json"
)
@click.option("--engine", "command", default=SCRIPTED, help="Command that serves an engine at {port}.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="The engine's model, as a folder.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Part to measure; repeatable. Default: all.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="Spec-Bench JSON lines, or text lines.")
@click.option("--n", default=16, type=click.IntRange(4), show_default=True, help="Prompts of `lossless`.")
@click.option("--longest", default=LONGEST_TOKENS, show_default=True, help="Tokens of a prompt, at most.")
@click.option("--tokens", default=32, type=click.IntRange(2), show_default=True, help="Of each answer, at most.")
@click.option("--pairs", default=8, type=click.IntRange(2), show_default=True, help="Prompts of `speed`.")
@click.option("--workers", default=6, show_default=True, help="Answers of `lossless` at once.")
@click.option("--restarts", default=2, show_default=True, help="How often the engine is killed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
def main(
    command: str, model: Path | None, only: tuple[str, ...], prompts: Path | None, n: int, longest: int, tokens: int,
    pairs: int, workers: int, restarts: int, json_file: Path,
) -> None:  # fmt: skip
    """Measure, and write the figures as JSON, after each part: what the file holds already is not measured again."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    result |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores shared by all", "engine": command}
    parts = [part for part in only or PARTS if part not in result]

    def keep(part: str, figures: Any) -> None:
        result[part] = figures
        json_file.write_text(json.dumps(result, indent=1) + "\n")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "memory" in parts:
            keep("memory", device_memory.measure(folder))
        if {"speed", "lossless"} & set(parts):
            checkpoint = Checkpoint.open(model or device_memory.write_tiny_llama(folder / "scripted"))
            engine = stack.enter_context(EngineProcess(command, free_port()))
            arguments = ("--engine-url", engine.url, "--engine-tokenizer", str(model or folder / "scripted"))
            cloud = stack.enter_context(CloudProcess(arguments=arguments))
            wait_described(cloud.target)
            if "speed" in parts:
                texts = list(FEW) if prompts is None else list(map(text_of, prompts.read_text().splitlines()))
                keep("speed", speed(engine, cloud, checkpoint, (texts * pairs)[: pairs + 1], tokens))
            if "lossless" in parts:
                chats = load_prompts(prompts, checkpoint.tokenizer, n, longest)
                settings = {"engine": command, "max_tokens": tokens, "workers": workers, "restarts": restarts}
                keep(
                    "lossless", lossless(engine, cloud, checkpoint, chats, settings, json_file.with_suffix(".partial"))
                )
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
