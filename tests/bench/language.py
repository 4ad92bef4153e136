"""The arms beside each other: tokens a second, time to the first token, bytes, cloud work, agreement, perplexity.

    arms and drafts  x  round trip 5 .. 150 ms  x  a cloud of this speed, and four times slower

Device and cloud have a core each where there are two, so that neither takes the other's time; the link between them is
emulated (round trip only). Each setting answers the same prompts greedily, every prompt by all ways in turn, so that
what else the machine does meets them alike; a way's first answer is not counted, it learns the link. `auto` is set
beside the fastest single arm of equal quality, prompt by prompt. Can be interrupted: settings that are in the JSON file
already are not run again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from scipy.stats import bootstrap

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Summary
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.sampling import choose
from isthmus.models.language.torch.decoder import Decoder, chunks, run_rows
from isthmus.models.messages import GREEDY
from tests.bench.processes import CloudProcess
from tests.bench.prompts import load_prompts
from tests.bench.proxy import LinkProxy, LinkSpec

RTTS_MS = (5, 20, 50, 100, 150)
SLOWDOWNS = (1, 4)
WIDTH = 16  # rows of a pass, padding included
LONGEST_TOKENS = 400
QUALITIES = (0.97, 0.99, 0.999, 1.0)  # the dial of auto
Settings = tuple[tuple[str, Any], ...]  # of an agent
Row = dict[str, Any]
Prompts = list[tuple[int, ...]]


class Way(NamedTuple):
    """One way to answers. `quality`: of auto."""

    arm: Arm
    settings: Settings
    quality: float | None = None


def methods(handoff: Path | None) -> dict[str, Way]:
    """By name; those that need a bundle of exits and judges where there is one."""
    eight: Settings = (("device_bits", 8),)
    found = {
        "cloud": Way("cloud", eight),
        "verify, 8-bit copy": Way("verify", eight),
        "verify, 4-bit copy": Way("verify", (("device_bits", 4),)),
        "verify, prompt lookup": Way("verify", (*eight, ("draft", "lookup"))),
        "edge, 8-bit": Way("edge", eight),
    }
    if handoff is not None:
        shared = (*eight, ("handoff", handoff))
        found |= {"handoff": Way("handoff", shared), "handoff, fill": Way("handoff", (*shared, ("fill", True)))}
        found |= {f"auto-q{quality:g}": Way("auto", shared, quality) for quality in QUALITIES}
    return found


@dataclass(frozen=True)
class Timed:
    """One answer: its tokens, how many of them the cloud did not make, and how long it took."""

    summary: Summary
    ids: list[int]
    own: int
    first_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.summary.tokens / self.total_s


def answer(agent: LanguageAgent, prompt: tuple[int, ...], way: Way, tokens: int) -> Timed:
    started_s, first_s, own, ids = time.perf_counter(), 0.0, 0, list[int]()
    for event in agent.generate(GenerationRequest(prompt, tokens, way.arm, quality=way.quality)):
        if isinstance(event, Summary):
            return Timed(event, ids, own, first_s, time.perf_counter() - started_s)
        first_s = first_s or time.perf_counter() - started_s
        own += event.source != "cloud"
        ids.append(event.id)
    raise RuntimeError("the answer ended without a summary")


def worth(decoder: Decoder, prompt: tuple[int, ...], ids: list[int]) -> tuple[int, float]:
    """How many tokens of an answer the cloud's model would have chosen there, and their log-probability by it."""
    text = [*prompt, *ids]
    logits_TV = run_rows(decoder, text, chunks(len(text), decoder.width))[len(prompt) - 1 : -1]
    chosen = [choose(logits_V, GREEDY, 0) for logits_V in logits_TV.numpy()]
    logprobs_T1 = logits_TV.log_softmax(1).gather(1, torch.tensor(ids)[:, None])
    return sum(own == id_ for own, id_ in zip(chosen, ids, strict=True)), float(logprobs_T1.sum())


def in_turns(
    turns: Mapping[str, tuple[LanguageAgent, Way]], prompts: Prompts, tokens: int, advance: Callable[[], None]
) -> dict[str, list[Timed]]:
    """Answers to all prompts by every way: each prompt by all of them, beginning with another, before the next one."""
    found: dict[str, list[Timed]] = {name: [] for name in turns}
    for agent, way in turns.values():
        answer(agent, prompts[0], way, tokens)
    for index, prompt in enumerate(prompts):
        names = deque(turns)
        names.rotate(-index)
        for name in names:
            found[name].append(answer(turns[name][0], prompt, turns[name][1], tokens))
            advance()
    return found


def row_of(every: list[Timed], prompts: Prompts, way: Way, flops: int, model: Decoder) -> Row:
    """What a way's answers to the prompts took, and what they are worth."""
    runs = [(timed.summary, timed.first_s, timed.total_s) for timed in every]
    worths = [worth(model, prompt, timed.ids) for prompt, timed in zip(prompts, every, strict=True)]
    made = sum(summary.tokens for summary, _, _ in runs)
    passes = sum(summary.passes for summary, _, _ in runs)
    drafts = sum(summary.accepted + summary.rejected for summary, _, _ in runs)
    rounds = sum(summary.rounds for summary, _, _ in runs)
    crossed = sum(summary.bytes_up + summary.bytes_down - summary.opening_bytes for summary, _, _ in runs)
    return {
        "prompts": len(prompts),
        "tokens": made,
        "tokens_per_s": statistics.median(timed.tokens_per_s for timed in every),
        "each_tokens_per_s": [round(timed.tokens_per_s, 2) for timed in every],
        "tokens_per_s_after_first": (made - len(runs)) / sum(total_s - first_s for _, first_s, total_s in runs),
        "first_token_ms": statistics.median(1000 * first_s for _, first_s, _ in runs),
        "bytes_up_per_token": sum(summary.bytes_up for summary, _, _ in runs) / made,
        "bytes_down_per_token": sum(summary.bytes_down for summary, _, _ in runs) / made,
        "bytes_per_round": crossed / rounds if rounds and way.arm == "verify" else None,
        "cloud_passes_per_token": passes / made,
        "cloud_gflops_per_token": passes * WIDTH * flops / made / 1e9,
        "device_share": sum(timed.own for timed in every) / made,
        "agreement": sum(right for right, _ in worths) / made,
        "perplexity": math.exp(-sum(logprob for _, logprob in worths) / made),
        "acceptance": sum(summary.accepted for summary, _, _ in runs) / drafts if drafts else None,
        "why": runs[-1][0].why,
    }


def beside(row: Row, quality: float, singles: Mapping[str, Row]) -> Row:
    """A row of auto's beside the fastest single arm that keeps its quality: tokens/s as a ratio, prompt by prompt."""
    wanted = min(quality, max(single["agreement"] for single in singles.values()))
    equal = [name for name, single in singles.items() if single["agreement"] >= wanted]
    best = max(equal, key=lambda name: float(singles[name]["tokens_per_s"]))
    ratios = np.array(row["each_tokens_per_s"]) / np.array(singles[best]["each_tokens_per_s"])
    found = bootstrap((ratios,), np.median, random_state=0).confidence_interval if len(ratios) > 1 else None
    low, high = (float(found.low), float(found.high)) if found else (None, None)
    return {"method": best, "ratio": float(np.median(ratios)), "low": low, "high": high}


def agents(
    stack: ExitStack, ways: dict[str, Way], model: str, target: str, threads: int
) -> dict[Settings, LanguageAgent]:
    """An agent for each kind of settings."""
    made: dict[Settings, LanguageAgent] = {}
    for way in ways.values():
        if way.settings not in made:
            config = LanguageConfig(model, (target,), threads=threads, connect_s=10.0, **dict(way.settings))
            made[way.settings] = stack.enter_context(LanguageAgent(config))
    return made


def run(
    model: str,
    handoff: Path | None,
    ways: dict[str, Way],
    prompts: Prompts,
    settings: Row,
    rows: list[Row],
    save: Any,
) -> None:
    """Every setting that has not got a row of each way yet."""
    done = {(row["slowdown"], row["rtt_ms"], row["method"]) for row in rows}
    every = product(settings["slowdowns"], settings["rtts_ms"])
    todo = [setting for setting in every if not all((*setting, name) in done for name in ways)]
    rows[:] = [row for row in rows if (row["slowdown"], row["rtt_ms"]) not in todo]
    mine, theirs = share_cores()
    torch.set_num_threads(len(mine))  # more threads than cores wait for each other
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the service: its bits are what answers are scored by
    checkpoint = Checkpoint.open(model)
    depth = HandoffBundle.open(handoff, checkpoint).depth if handoff else 0
    flops = {way.arm: 2 * parameters(checkpoint.config, depth * (way.arm == "handoff")) for way in ways.values()}
    whole = Decoder.load(checkpoint)
    with Progress() as bar:
        task = bar.add_task("answers", total=len(todo) * len(ways) * len(prompts))
        for slowdown, rtt_ms in todo:
            os.environ["ISTHMUS_BENCH_SLOWDOWN"] = str(slowdown)
            with ExitStack() as stack:
                cloud = CloudProcess(
                    arguments=("--model", model, *(("--handoff", str(handoff)) if handoff else ())),
                    module="tests.bench.slow_cloud",
                    cpus=",".join(map(str, theirs)),
                )
                stack.enter_context(cloud)
                proxy = stack.enter_context(LinkProxy(cloud.port, LinkSpec(None, rtt_ms / 1000)))
                by_way = agents(stack, ways, model, f"127.0.0.1:{proxy.port}", len(mine))
                turns = {name: (by_way[way.settings], way) for name, way in ways.items()}
                timed = in_turns(turns, prompts, settings["max_tokens"], lambda: bar.advance(task))
            here = {name: row_of(timed[name], prompts, way, flops[way.arm], whole) for name, way in ways.items()}
            singles = {name: here[name] for name, way in ways.items() if way.quality is None}
            for name, way in ways.items():
                found = beside(here[name], way.quality, singles) if singles and way.quality is not None else None
                row = {"method": name, "rtt_ms": rtt_ms, "slowdown": slowdown, **here[name]}
                rows.append({**row, "beside": found})
            save()


def share_cores() -> tuple[list[int], list[int]]:
    """The device's core, which this process keeps to from now on, and the cloud's cores."""
    cores = sorted(os.sched_getaffinity(0))
    mine, theirs = (cores[:1], cores[1:]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, mine)
    return mine, theirs


def parameters(config: LlamaConfig, depth: int) -> int:
    """Weights that one row of a pass meets: all but the embedding, behind `depth` layers, and the head."""
    return (config.layers - depth) * layer_weights(config) + config.hidden * config.vocab


def layer_weights(config: LlamaConfig) -> int:
    attention = config.hidden * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return attention + 3 * config.hidden * config.ffn


def table(rows: list[Row]) -> Table:
    method = Column("method", no_wrap=True)
    page = Table(
        "cloud, way",
        method,
        "tokens/s",
        "first ms",
        "B up",
        "B down",
        "passes",
        "device",
        "right",
        "accepted",
        "of the best arm",
    )
    for row in sorted(rows, key=lambda row: (row["slowdown"], row["rtt_ms"], row["method"])):
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        page.add_row(
            f"{row['slowdown']}x {row['rtt_ms']} ms", row["method"], f"{row['tokens_per_s']:.1f}",
            f"{row['first_token_ms']:.0f}", f"{row['bytes_up_per_token']:.1f}", f"{row['bytes_down_per_token']:.1f}",
            f"{row['cloud_passes_per_token']:.2f}", f"{row['device_share']:.0%}", f"{row['agreement']:.1%}",
            accepted, told(row["beside"]),
        )  # fmt: skip
    return page


def told(found: Row | None) -> str:
    if found is None:
        return ""
    bounds = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['ratio']:.2f}{bounds} of {found['method']}"


def plot(rows: list[Row], names: Iterable[str], file: Path) -> None:
    from matplotlib.figure import Figure

    slowdowns = sorted({row["slowdown"] for row in rows})
    figure = Figure(figsize=(5.2 * len(slowdowns), 4), layout="constrained")
    for index, slowdown in enumerate(slowdowns):
        axes = figure.add_subplot(1, len(slowdowns), index + 1)
        for name in names:
            points = sorted(
                (r["rtt_ms"], r["tokens_per_s"]) for r in rows if (r["method"], r["slowdown"]) == (name, slowdown)
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title="cloud as it is" if slowdown == 1 else f"cloud {slowdown} times slower", xlabel="round trip, ms")
        axes.set(ylabel="tokens/s, median of answers", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


@click.command(
    epilog="Example: python -m tests.bench.language --handoff models/zoo/smollm2 --prompts p.jsonl --json l.json"
)
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="Spec-Bench JSON lines, or text lines.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--handoff", type=click.Path(path_type=Path, exists=True), help="Its bundle of exits, for that arm.")
@click.option("--n", default=8, type=click.IntRange(1), show_default=True, help="Prompts.")
@click.option("--tokens", default=64, type=click.IntRange(2), show_default=True, help="Of each answer, at most.")
@click.option("--rtt-ms", "rtts_ms", multiple=True, type=int, default=RTTS_MS, show_default=True)
@click.option("--slowdown", "slowdowns", multiple=True, type=int, default=SLOWDOWNS, show_default=True)
@click.option("--only", multiple=True, help="Ways whose name begins like this, repeatable.  [default: all]")
@click.option("--quick", is_flag=True, help="One round trip, one speed, two prompts, 12 tokens.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    prompts: Path | None, model: str, handoff: Path | None, n: int, tokens: int, rtts_ms: tuple[int, ...],
    slowdowns: tuple[int, ...], only: tuple[str, ...], quick: bool, json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure every arm on every link."""
    n, tokens = (2, 12) if quick else (n, tokens)
    settings: Row = {
        "model": model,
        "handoff": str(handoff) if handoff else None,
        "prompts": n,
        "max_tokens": tokens,
        "rtts_ms": [20] if quick else list(rtts_ms),
        "slowdowns": [1] if quick else list(slowdowns),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; device and cloud have one each",
    }
    former = json.loads(json_file.read_text()) if json_file.exists() else {}
    rows: list[Row] = former["rows"] if former.get("settings") == settings else []
    json_file.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        json_file.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")

    ids = load_prompts(prompts, Checkpoint.open(model).tokenizer, n, LONGEST_TOKENS)
    ways = {name: way for name, way in methods(handoff).items() if not only or name.startswith(only)}
    run(model, handoff, ways, ids, settings, rows, save)
    Console().print(table(rows))
    if plot_file:
        plot(rows, ways, plot_file)


if __name__ == "__main__":
    main()
