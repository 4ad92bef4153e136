"""The arms compared: tokens per second, time to the first token, bytes, cloud work, agreement, perplexity.

    arms and drafts  x  round trip 5 .. 150 ms  x  a cloud of this speed, and four times slower

Device and cloud have one core each where there are two, so that neither takes the other's time; the link between them
is emulated (round trip only). Each setting answers the same prompts greedily, and every prompt is answered by all
methods in turn, so that other load on the machine affects them alike. The first answer of a method is not counted, as
the device still measures the link. `auto` is compared with the fastest single arm of equal quality, prompt by prompt.
An interrupted run can be resumed: settings that are in the JSON file already are not run again.
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
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.sampling import choose
from isthmus.models.language.torch.batch_invariance import chunks, run_tokens
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import GREEDY
from tests.bench.processes import CloudProcess
from tests.bench.prompts import load_prompts
from tests.bench.proxy import LinkProxy, LinkSpec

RTTS_MS = (5, 20, 50, 100, 150)
SLOWDOWNS = (1, 4)
LONGEST_TOKENS = 400
QUALITIES = (0.97, 0.99, 0.999, 1.0)  # of auto
Settings = tuple[tuple[str, Any], ...]  # options of LanguageConfig
Row = dict[str, Any]
Prompts = list[tuple[int, ...]]


class Method(NamedTuple):
    """An arm with settings of the agent. `quality`: of auto."""

    arm: Arm
    settings: Settings
    quality: float | None = None


def pair_methods() -> dict[str, Method]:
    """Of two different models; `auto` needs a router bundle of the pair, and `auto-q1` none."""
    int4: Settings = (("device_bits", 4),)
    singles = {name: Method(arm, int4) for name, arm in (("cloud", "cloud"), ("verify", "verify"), ("edge", "edge"))}
    return singles | {f"auto-q{quality:g}": Method("auto", int4, quality) for quality in QUALITIES}


def methods(handoff: Path | None) -> dict[str, Method]:
    """Of one model, by name. Those that need a handoff bundle are left out without one."""
    int8: Settings = (("device_bits", 8),)
    by_name = {
        "cloud": Method("cloud", int8),
        "verify, 8-bit copy": Method("verify", int8),
        "verify, 4-bit copy": Method("verify", (("device_bits", 4),)),
        "verify, prompt lookup": Method("verify", (*int8, ("draft", "lookup"))),
        "edge, 8-bit": Method("edge", int8),
    }
    if handoff is not None:
        with_handoff = (*int8, ("handoff", handoff))
        by_name |= {
            "handoff": Method("handoff", with_handoff),
            "handoff, fill": Method("handoff", (*with_handoff, ("fill", True))),
        }
        by_name |= {f"auto-q{quality:g}": Method("auto", with_handoff, quality) for quality in QUALITIES}
    return by_name


@dataclass(frozen=True)
class TimedAnswer:
    """One answer with its times. `device_tokens`: those that the cloud did not generate."""

    summary: Summary
    ids: list[int]
    device_tokens: int
    first_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.summary.tokens / self.total_s


def answer(agent: LanguageAgent, prompt: tuple[int, ...], method: Method, tokens: int) -> TimedAnswer:
    start_s, first_s, device_tokens, ids = time.perf_counter(), 0.0, 0, list[int]()
    for event in agent.generate(GenerationRequest(prompt, tokens, method.arm, quality=method.quality)):
        if isinstance(event, Summary):
            return TimedAnswer(event, ids, device_tokens, first_s, time.perf_counter() - start_s)
        first_s = first_s or time.perf_counter() - start_s
        device_tokens += event.source != "cloud"
        ids.append(event.id)
    raise RuntimeError("the answer ended without a summary")


def score(decoder: Decoder, prompt: tuple[int, ...], ids: list[int]) -> tuple[int, float]:
    """How many tokens of an answer the cloud's model would have chosen, and their log probability under that model."""
    text = [*prompt, *ids]
    logits_TV = run_tokens(decoder, text, chunks(len(text), decoder.width))[len(prompt) - 1 : -1]
    chosen = [choose(logits_V, GREEDY, 0) for logits_V in logits_TV.numpy()]
    logprobs_T1 = logits_TV.log_softmax(1).gather(1, torch.tensor(ids)[:, None])
    return sum(own == id_ for own, id_ in zip(chosen, ids, strict=True)), float(logprobs_T1.sum())


def interleave(
    agents_of: Mapping[str, tuple[LanguageAgent, Method]], prompts: Prompts, tokens: int, advance: Callable[[], None]
) -> dict[str, list[TimedAnswer]]:
    """Answers of every method to all prompts: each prompt by all methods, in rotated order, before the next prompt."""
    answers: dict[str, list[TimedAnswer]] = {name: [] for name in agents_of}
    for agent, method in agents_of.values():
        answer(agent, prompts[0], method, tokens)
    for index, prompt in enumerate(prompts):
        names = deque(agents_of)
        names.rotate(-index)
        for name in names:
            answers[name].append(answer(agents_of[name][0], prompt, agents_of[name][1], tokens))
            advance()
    return answers


def summarize(answers: list[TimedAnswer], prompts: Prompts, method: Method, model: Decoder) -> Row:
    """Times, costs and quality of a method's answers to the prompts."""
    runs = [(timed.summary, timed.first_s, timed.total_s) for timed in answers]
    scores = [score(model, prompt, timed.ids) for prompt, timed in zip(prompts, answers, strict=True)]
    tokens = sum(summary.tokens for summary, _, _ in runs)
    passes = sum(summary.passes for summary, _, _ in runs)
    drafts = sum(summary.accepted + summary.rejected for summary, _, _ in runs)
    rounds = sum(summary.rounds for summary, _, _ in runs)
    round_bytes = sum(summary.bytes_up + summary.bytes_down - summary.opening_bytes for summary, _, _ in runs)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "tokens_per_s": statistics.median(timed.tokens_per_s for timed in answers),
        "each_tokens_per_s": [round(timed.tokens_per_s, 2) for timed in answers],
        "tokens_per_s_after_first": (tokens - len(runs)) / sum(total_s - first_s for _, first_s, total_s in runs),
        "first_token_ms": statistics.median(1000 * first_s for _, first_s, _ in runs),
        "bytes_up_per_token": sum(summary.bytes_up for summary, _, _ in runs) / tokens,
        "bytes_down_per_token": sum(summary.bytes_down for summary, _, _ in runs) / tokens,
        "bytes_per_round": round_bytes / rounds if rounds and method.arm == "verify" else None,
        "cloud_passes_per_token": passes / tokens,
        "cloud_gflops_per_token": sum(summary.cloud.flops for summary, _, _ in runs) / tokens / 1e9,
        "device_gflops_per_token": sum(summary.device.flops for summary, _, _ in runs) / tokens / 1e9,
        "cloud_tokens_per_token": sum(summary.cloud.tokens for summary, _, _ in runs) / tokens,
        "cloud_repeated": sum(summary.cloud.repeated for summary, _, _ in runs),
        "device_share": sum(timed.device_tokens for timed in answers) / tokens,
        "agreement": sum(right for right, _ in scores) / tokens,
        "perplexity": math.exp(-sum(logprob for _, logprob in scores) / tokens),
        "acceptance": sum(summary.accepted for summary, _, _ in runs) / drafts if drafts else None,
        "why": runs[-1][0].why,
    }


def compare_with_best_single(row: Row, quality: float, singles: Mapping[str, Row]) -> Row:
    """A row of auto against the fastest single arm that keeps its quality: the median ratio of tokens/s by prompt."""
    target = min(quality, max(single["agreement"] for single in singles.values()))
    equal = [name for name, single in singles.items() if single["agreement"] >= target]
    best = max(equal, key=lambda name: float(singles[name]["tokens_per_s"]))
    ratios = np.array(row["each_tokens_per_s"]) / np.array(singles[best]["each_tokens_per_s"])
    interval = bootstrap((ratios,), np.median, random_state=0).confidence_interval if len(ratios) > 1 else None
    low, high = (float(interval.low), float(interval.high)) if interval else (None, None)
    return {"method": best, "ratio": float(np.median(ratios)), "low": low, "high": high}


def agents(
    stack: ExitStack, chosen: dict[str, Method], device: str, target: str, threads: int
) -> dict[Settings, LanguageAgent]:
    """An agent for each combination of settings."""
    opened: dict[Settings, LanguageAgent] = {}
    for method in chosen.values():
        if method.settings not in opened:
            config = LanguageConfig(device, (target,), threads=threads, connect_s=10.0, **dict(method.settings))
            opened[method.settings] = stack.enter_context(LanguageAgent(config))
    return opened


def run(
    model: str,
    device: str,
    handoff: Path | None,
    chosen: dict[str, Method],
    prompts: Prompts,
    settings: Row,
    rows: list[Row],
    save: Any,
) -> None:
    """Run every setting that lacks a row of some method."""
    done = {(row["slowdown"], row["rtt_ms"], row["method"]) for row in rows}
    settings_pairs = product(settings["slowdowns"], settings["rtts_ms"])
    todo = [setting for setting in settings_pairs if not all((*setting, name) in done for name in chosen)]
    rows[:] = [row for row in rows if (row["slowdown"], row["rtt_ms"]) not in todo]
    device_cores, cloud_cores = share_cores()
    torch.set_num_threads(len(device_cores))  # more threads than cores slow each other down
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in the service, whose exact logits score the answers
    checkpoint = Checkpoint.open(model)
    full = Decoder.load(checkpoint)
    with Progress() as bar:
        task = bar.add_task("answers", total=len(todo) * len(chosen) * len(prompts))
        for slowdown, rtt_ms in todo:
            os.environ["ISTHMUS_BENCH_SLOWDOWN"] = str(slowdown)
            with ExitStack() as stack:
                cloud = CloudProcess(
                    arguments=("--model", model, *(("--handoff", str(handoff)) if handoff else ())),
                    module="tests.bench.slow_cloud",
                    cpus=",".join(map(str, cloud_cores)),
                )
                stack.enter_context(cloud)
                proxy = stack.enter_context(LinkProxy(cloud.port, LinkSpec(None, rtt_ms / 1000)))
                agents_by_settings = agents(stack, chosen, device, f"127.0.0.1:{proxy.port}", len(device_cores))
                agents_of = {name: (agents_by_settings[method.settings], method) for name, method in chosen.items()}
                timed = interleave(agents_of, prompts, settings["max_tokens"], lambda: bar.advance(task))
            here = {name: summarize(timed[name], prompts, each, full) for name, each in chosen.items()}
            singles = {name: here[name] for name, method in chosen.items() if method.quality is None}
            for name, method in chosen.items():
                comparison = (
                    compare_with_best_single(here[name], method.quality, singles)
                    if singles and method.quality is not None
                    else None
                )
                row = {"method": name, "rtt_ms": rtt_ms, "slowdown": slowdown, **here[name]}
                rows.append({**row, "beside": comparison})
            save()


def share_cores() -> tuple[list[int], list[int]]:
    """Cores of the device, to which this process is bound from now on, and cores of the cloud."""
    cores = sorted(os.sched_getaffinity(0))
    device_cores, cloud_cores = (cores[:1], cores[1:]) if len(cores) > 1 else (cores, cores)
    os.sched_setaffinity(0, device_cores)
    return device_cores, cloud_cores


def table(rows: list[Row]) -> Table:
    method = Column("method", no_wrap=True)
    page = Table(
        "cloud, link",
        method,
        "tokens/s",
        "first ms",
        "B up",
        "B down",
        "passes",
        "GFLOP cloud",
        "GFLOP device",
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
            f"{row['cloud_passes_per_token']:.2f}", f"{row['cloud_gflops_per_token']:.2f}",
            f"{row['device_gflops_per_token']:.2f}", f"{row['device_share']:.0%}", f"{row['agreement']:.1%}",
            accepted, format_comparison(row["beside"]),
        )  # fmt: skip
    return page


def format_comparison(comparison: Row | None) -> str:
    if comparison is None:
        return ""
    bounds = "" if comparison["low"] is None else f" [{comparison['low']:.2f}, {comparison['high']:.2f}]"
    return f"{comparison['ratio']:.2f}{bounds} of {comparison['method']}"


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
@click.option("--model", default="smollm2", show_default=True, help="The cloud's, and the device's without --device.")
@click.option("--device", help="Another model on the device, in 4 bits.")
@click.option(
    "--handoff", type=click.Path(path_type=Path, exists=True), help="Handoff bundle of the model, for handoff and auto."
)
@click.option("--n", default=8, type=click.IntRange(1), show_default=True, help="Number of prompts.")
@click.option("--tokens", default=64, type=click.IntRange(2), show_default=True, help="Most tokens of each answer.")
@click.option("--rtt-ms", "rtts_ms", multiple=True, type=int, default=RTTS_MS, show_default=True)
@click.option("--slowdown", "slowdowns", multiple=True, type=int, default=SLOWDOWNS, show_default=True)
@click.option("--only", multiple=True, help="Only methods whose name starts with this, repeatable.  [default: all]")
@click.option("--quick", is_flag=True, help="One round trip, one speed, two prompts, 12 tokens.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    prompts: Path | None, model: str, device: str | None, handoff: Path | None, n: int, tokens: int,
    rtts_ms: tuple[int, ...], slowdowns: tuple[int, ...], only: tuple[str, ...], quick: bool, json_file: Path,
    plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure every arm on every link."""
    n, tokens = (2, 12) if quick else (n, tokens)
    settings: Row = {
        "model": model,
        **({"device": device} if device else {}),
        "handoff": str(handoff) if handoff else None,
        "prompts": n,
        "max_tokens": tokens,
        "rtts_ms": [20] if quick else list(rtts_ms),
        "slowdowns": [1] if quick else list(slowdowns),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; device and cloud have one each",
    }
    previous = json.loads(json_file.read_text()) if json_file.exists() else {}
    rows: list[Row] = previous["rows"] if previous.get("settings") == settings else []
    json_file.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        json_file.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")

    ids = load_prompts(prompts, Checkpoint.open(model).tokenizer, n, LONGEST_TOKENS)
    known = pair_methods() if device else methods(handoff)
    chosen = {name: method for name, method in known.items() if not only or name.startswith(only)}
    run(model, device or model, handoff, chosen, ids, settings, rows, save)
    Console().print(table(rows))
    if plot_file:
        plot(rows, chosen, plot_file)


if __name__ == "__main__":
    main()
