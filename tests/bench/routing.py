"""Measure routers of tokens: the quality of answers against the offload rate.

    the model's greedy answers to prompts --local model--> which of its choices are right, confidence of each router

Quality is the share of tokens that equal the choice of the cloud's model, each with that model's text before it: 1 for
the cloud, less for the local model. Our confidence head is compared with the probability of the token, that of the
answer's first token (from the device's prefill), chance, and an oracle. Intervals come from resampling prompts, with
the same samples for all routers. The promises of the `auto` dial are checked on the same answers, which nothing was
calibrated on.

Source: RouteLLM (Ong et al., ICLR 2025) for APGR, the mean recovered share of the quality gap, and CPT(x), the share of
calls that recovers x % of it. A call is a token here, so that routers of prompts and of tokens can be compared.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from isthmus.edge_agent.policy.arms import level_for
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.local_model import answer_features
from isthmus.models.recipes.language.prompts import greedy_answers, load_prompts
from isthmus.models.recipes.language.teacher import run_teacher

QUALITIES = (0.97, 0.98, 0.99, 0.995, 0.999)
CURVE_POINTS = 101
OURS = "confidence head (ours)"
NO_LOSS = 0.999  # quality that counts as no loss

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Row = dict[str, Any]


@dataclass(frozen=True)
class Routed:
    """Which tokens the local model has right, in the order in which a router offloads them."""

    right_N: Bools

    @property
    def quality(self) -> Floats:
        """The quality (N + 1,) after each number of offloaded tokens."""
        wrong_N = np.cumsum(~self.right_N[::-1])[::-1]
        return 1 - np.append(wrong_N, 0) / len(self.right_N)

    @property
    def apgr(self) -> float:
        weak = self.quality[0]
        return float((self.quality[:-1].mean() - weak) / (1 - weak)) if weak < 1 else 1.0

    def calls(self, quality: float) -> float:
        """The offload rate that reaches this quality."""
        return float(np.argmax(self.quality >= quality - 1e-12) / len(self.right_N))

    def figures(self) -> dict[str, float]:
        weak = float(self.quality[0])
        return {
            "apgr": self.apgr,
            "cpt50": self.calls(weak + 0.5 * (1 - weak)),
            "cpt80": self.calls(weak + 0.8 * (1 - weak)),
            "saved_at_no_loss": 1 - self.calls(NO_LOSS),
        }


def order(confidence_N: Floats, right_N: Bools, generator: np.random.Generator) -> Routed:
    """The least confident tokens first; ties in random order."""
    return Routed(right_N[np.lexsort((generator.random(len(confidence_N)), confidence_N))])


def resampled(confidence_N: Floats, right_N: Bools, starts_S: NDArray[np.int64], times: int) -> dict[str, list[float]]:
    """Figures of `times` bootstrap samples of the answers, the same samples for every router."""
    draws, chance = np.random.default_rng(0), np.random.default_rng(1)
    spans = np.split(np.arange(len(right_N)), starts_S[1:])
    found: dict[str, list[float]] = {}
    for _ in range(times):
        drawn_N = np.concatenate([spans[index] for index in draws.integers(0, len(spans), len(spans))])
        for name, value in order(confidence_N[drawn_N], right_N[drawn_N], chance).figures().items():
            found.setdefault(name, []).append(value)
    return found


def bounds(values: Sequence[float]) -> list[float]:
    """A 95 % interval."""
    return [float(np.quantile(values, edge)) for edge in (0.025, 0.975)]


@dataclass(frozen=True)
class CloudCost:
    """The cost of answers in the cloud: its model, tokens of each prompt, first token of each answer."""

    config: LlamaConfig
    prompts_S: NDArray[np.int64]
    starts_S: NDArray[np.int64]

    def share(self, offloaded_N: Bools) -> float:
        """The cloud's computation relative to decoding all answers itself.

        It reads the text of an answer that has an offloaded token, up to the last of these.
        """
        ours = alone = 0
        for prompt, offloaded in zip(self.prompts_S, np.split(offloaded_N, self.starts_S[1:]), strict=True):
            places = np.flatnonzero(offloaded)
            alone += self._flops(int(prompt) + len(offloaded) - 1, len(offloaded))
            if len(places):
                ours += self._flops(int(prompt + places[-1]), len(places))
        return ours / alone

    def _flops(self, tokens: int, decided: int) -> int:
        return decoder_flops(self.config, 0, tokens, layers=self.config.layers, decided=decided)


def dial(handoff: HandoffBundle, bits: int, head_N: Floats, right_N: Bools, cost: CloudCost) -> list[Row]:
    """The offload level for each quality of the dial, and the quality measured at it."""
    local_model = handoff.local_model(bits)
    assert local_model is not None
    rows = []
    for quality in QUALITIES:
        level = level_for(local_model[1], quality)
        offloaded_N = head_N < (level.likely if level else 2.0)
        as_cloud = interval(offloaded_N | right_N)
        rows.append(
            {
                "quality": quality,
                "likely": level.likely if level else None,
                "agreement": as_cloud.value,
                "interval": [as_cloud.low, as_cloud.high],
                "asked": float(offloaded_N.mean()),
                "cloud": cost.share(offloaded_N),
                "of_those_on_the_device": float(right_N[~offloaded_N].mean()) if (~offloaded_N).any() else None,
            }
        )
    return rows


def measure(handoff: HandoffBundle, bits: int, features_NF: Floats, right_N: Bools, cost: CloudCost, times: int) -> Row:
    local_model = handoff.local_model(bits)
    if local_model is None:
        raise click.ClickException(f"{handoff.manifest.name} has no local model in {bits} bits")
    head_N = local_model[0].predict(features_NF.astype(np.float32)).astype(np.float64)
    starts_S = cost.starts_S
    answer_N = np.repeat(np.arange(len(starts_S)), np.diff(np.append(starts_S, len(right_N))))
    generator = np.random.default_rng(0)
    routers: dict[str, Callable[[], Floats]] = {
        OURS: lambda: head_N,
        "confidence of tokens": lambda: features_NF[:, 0],
        "confidence of prompts": lambda: features_NF[starts_S, 0][answer_N],
        "chance": lambda: generator.random(len(right_N)),
        "oracle": lambda: right_N.astype(np.float64),
    }
    rows: dict[str, Row] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for name, confidence in track(routers.items(), f"routers, {bits} bits"):
        routed = order(confidence(), right_N, generator)
        samples[name] = resampled(confidence(), right_N, starts_S, times)
        places = np.linspace(0, len(right_N), CURVE_POINTS).astype(int)
        rows[name] = {
            **routed.figures(),
            "intervals": {figure: bounds(values) for figure, values in samples[name].items()},
            "curve": [[float(place / len(right_N)), float(routed.quality[place])] for place in places],
        }
    ours = np.array(samples[OURS]["apgr"])
    return {
        "device_alone": float(right_N.mean()),
        "routers": rows,
        "apgr_above": {name: bounds((ours - each["apgr"]).tolist()) for name, each in samples.items() if name != OURS},
        "dial": dial(handoff, bits, head_N, right_N, cost),
    }


def table(result: Row) -> list[Table]:
    pages = []
    for bits, found in result["copies"].items():
        title = f"{bits}-bit local model, alone {found['device_alone']:.2%}"
        page = Table("router", "APGR", "CPT(50)", "CPT(80)", "no loss", title=title)
        for name, row in found["routers"].items():
            low, high = row["intervals"]["apgr"]
            cells = [f"{row['cpt50']:.1%}", f"{row['cpt80']:.1%}", f"{row['saved_at_no_loss']:.1%}"]
            page.add_row(name, f"{row['apgr']:.3f} [{low:.3f}, {high:.3f}]", *cells)
        promised = Table("auto-q", "quality", "offload rate", "cloud", "of local tokens", title="the dial")
        for row in found["dial"]:
            own = row["of_those_on_the_device"]
            low, high = row["interval"]
            promised.add_row(
                f"{row['quality']:g}",
                f"{row['agreement']:.2%} [{low:.2%}, {high:.2%}]",
                f"{row['asked']:.1%}",
                f"{row['cloud']:.0%}",
                "" if own is None else f"{own:.2%}",
            )
        pages += [page, promised]
    return pages


def plot(result: Row, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(result["copies"]), 4), layout="constrained")
    for index, (bits, found) in enumerate(result["copies"].items()):
        axes = figure.add_subplot(1, len(result["copies"]), index + 1)
        for name, row in found["routers"].items():
            axes.plot(*(100 * np.array(row["curve"])).T, label=f"{name}, APGR {row['apgr']:.2f}")
        for row in found["dial"]:
            axes.plot(100 * row["asked"], 100 * row["agreement"], "k.")
        axes.set(title=f"local model in {bits} bits", xlabel="offload rate, %", ylabel="quality, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


@click.command(epilog="Example: python -m tests.bench.routing --prompts p.jsonl --json runs/routing.json")
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("models/zoo/smollm2"), show_default=True)
@click.option("--model", default="smollm2", show_default=True)
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), required=True, help="As Spec-Bench's.")
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Use every N-th prompt, by length.")
@click.option("--bits", "all_bits", multiple=True, type=click.Choice(["4", "8"]), default=("8", "4"), show_default=True)
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(10))
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/routing"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    bundle: Path, model: str, prompts: Path, every: int, all_bits: tuple[str, ...], resamples: int, work: Path,
    json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure routers of tokens and of prompts between a local model and the cloud."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(model)
    handoff, llama = HandoffBundle.open(bundle, checkpoint), Llama.load(checkpoint)
    test_prompts = load_prompts(prompts, checkpoint.tokenizer, every)
    _, corpus = greedy_answers(work, llama, checkpoint.tokenizer.eos_ids, test_prompts)
    teacher = run_teacher(llama, corpus, ())
    chosen = [s for s in range(len(teacher)) if teacher.has_answer(s)]
    lengths = [teacher.bounds(s)[1] - teacher.answers[s] for s in chosen]
    read = [teacher.answers[s] - teacher.bounds(s)[0] for s in chosen]
    cost = CloudCost(checkpoint.config, np.array(read), np.cumsum([0, *lengths[:-1]]))
    models: Row = {}
    for bits in map(int, all_bits):
        features_NF, right_N = (found.numpy() for found in answer_features(checkpoint, bits, teacher, chosen))
        models[str(bits)] = measure(handoff, bits, features_NF.astype(np.float64), right_N, cost, resamples)
    result: Row = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "answers": len(chosen),
        "tokens": int(sum(lengths)),
        "copies": models,
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for page in table(result):
        Console().print(page)
    if plot_file:
        plot(result, plot_file)


if __name__ == "__main__":
    main()
