"""Measure routers of tokens: the quality of answers against the offload rate.

    the cloud's greedy answers to prompts --device's model--> which of its choices are right, confidence of each router

Quality is the share of tokens that equal the choice of the cloud's model, each with that model's text before it: 1 for
the cloud, less for the local model. Our confidence head is compared with the probability of the token, that of the
answer's first token (from the device's prefill), chance, and an oracle. Intervals come from resampling prompts, with
the same samples for all routers. Where a bundle was made from the same prompts, those that trained its head are left
out. Certificates are checked on halves of the rest, drawn again and again: one half certifies, the other one measures.

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
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import level_for
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.common.learn_then_test import certify
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.prompts import ANSWER_TOKENS
from isthmus.models.recipes.language.router import answers_of, device_choices, run_for, split
from isthmus.models.recipes.language.router_answers import LocalCloud
from isthmus.models.recipes.language.router_levels import Choices, mean_interval
from tests.bench.routing_loop import routed_losses

QUALITIES = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
CERTIFICATE_DRAWS = 200
ZOO = Path("models/zoo")
SHIPPED = ZOO / "smollm2-8-smollm2", ZOO / "smollm2-4-smollm2"
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


def dial(bundle: RouterBundle, head_N: Floats, right_N: Bools, cost: CloudCost) -> list[Row]:
    """The offload level for each quality of the dial, and the quality measured at it."""
    rows = []
    for quality in QUALITIES:
        level = level_for(bundle.levels, quality)
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


def resample_certificates(bundle: RouterBundle, choices: Choices, times: int) -> list[Row]:
    """How often what one half of the prompts certifies holds on the other half, by quality of the dial.

    held: share of the draws, among those that certified a level, in which the other half's mean loss is within it.
    """
    losses_LP = np.stack([choices.losses(level.likely) for level in bundle.levels])
    rng, held = np.random.default_rng(0), {quality: list[bool]() for quality in QUALITIES}
    for _ in track(range(times), "certificates"):
        order_P = rng.permutation(losses_LP.shape[1])
        one_P, other_P = np.array_split(order_P, 2)
        certified = certify(list(losses_LP[::-1, one_P]))[::-1]
        for quality, found in held.items():
            index = next((index for index, epsilon in enumerate(certified) if 1 - epsilon >= quality), None)
            if index is not None:
                found.append(bool(losses_LP[index, other_P].mean() <= 1 - quality))
    return [
        {"quality": quality, "certified": len(found), "held": float(np.mean(found)) if found else None}
        for quality, found in held.items()
    ]


def run_loop(bundle: RouterBundle, checkpoint: Checkpoint, cloud: str, prompts: Sequence[Sequence[int]]) -> list[Row]:
    """Loss and offload rate in closed loop, for each quality of the dial that a level keeps."""
    if not prompts or bundle.head is None:
        return []
    there = Checkpoint.open(cloud)
    model, longest = Llama.load(there), max(map(len, prompts)) + ANSWER_TOKENS
    decoder = OnnxDecoder(checkpoint, longest, bundle.manifest.device.bits, torch.get_num_threads())
    rows: list[Row] = []
    for quality in QUALITIES:
        level = level_for(bundle.levels, quality)
        if level is None or any(row["likely"] == level.likely for row in rows):
            continue
        losses_P, asked = routed_losses(decoder, bundle.head, model, level.likely, prompts, there.tokenizer.eos_ids)
        wrong = mean_interval(losses_P, 0).model_dump()
        rows.append({"quality": quality, "likely": level.likely, "asked": asked, "wrong": wrong})
    return rows


def measure(
    bundle: RouterBundle, features_NF: Floats, right_N: Bools, answer_N: NDArray[np.int64], cost: CloudCost, times: int
) -> Row:
    if bundle.head is None:
        raise click.ClickException(f"{bundle.manifest.name} has no levels of tokens")
    head_N = bundle.head.predict(features_NF.astype(np.float32)).astype(np.float64)
    starts_S = cost.starts_S
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
    for name, confidence in track(routers.items(), f"routers, {bundle.manifest.name}"):
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
        "dial": dial(bundle, head_N, right_N, cost),
        "certificates": resample_certificates(bundle, Choices(head_N, right_N, answer_N), CERTIFICATE_DRAWS),
    }


def table(result: Row) -> list[Table]:
    pages = []
    for pair, found in result["pairs"].items():
        title = f"{pair}: the device alone {found['device_alone']:.2%}"
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
        checked = Table("quality", "draws that certify it", "of these it held", title="certificates")
        for row in found["certificates"]:
            held = "" if row["held"] is None else f"{row['held']:.1%}"
            checked.add_row(f"{row['quality']:g}", str(row["certified"]), held)
        pages += [page, promised, checked]
        if found["closed_loop"]:
            looped = Table("quality", "offload rate", "wrong", title="in closed loop")
            for row in found["closed_loop"]:
                wrong = row["wrong"]
                bounds_ = f"{wrong['value']:.2%} [{wrong['low']:.2%}, {wrong['high']:.2%}] of {wrong['samples']}"
                looped.add_row(f"{row['quality']:g}", f"{row['asked']:.1%}", bounds_)
            pages.append(looped)
    return pages


def plot(result: Row, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(result["pairs"]), 4), layout="constrained")
    for index, (pair, found) in enumerate(result["pairs"].items()):
        axes = figure.add_subplot(1, len(result["pairs"]), index + 1)
        for name, row in found["routers"].items():
            axes.plot(*(100 * np.array(row["curve"])).T, label=f"{name}, APGR {row['apgr']:.2f}")
        for row in found["dial"]:
            axes.plot(100 * row["asked"], 100 * row["agreement"], "k.")
        axes.set(title=pair, xlabel="offload rate, %", ylabel="quality, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


@click.command(epilog="Example: python -m tests.bench.routing --prompts p.jsonl --json runs/routing.json")
@click.option(
    "--router",
    "routers",
    multiple=True,
    type=click.Path(path_type=Path),
    default=SHIPPED,
    show_default=True,
    help="Router bundle, repeatable.",
)
@click.option("--device", default="smollm2", show_default=True, help="The device's model.")
@click.option("--cloud", default="smollm2", show_default=True, help="The cloud's model, run here.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), required=True, help="Lines, or as Spec-Bench.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(10))
@click.option(
    "--closed-loop",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Answer so many of the prompts in closed loop as well, at each quality.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/router"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    routers: tuple[Path, ...], device: str, cloud: str, prompts: Path, resamples: int, closed_loop: int, work: Path,
    json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure routers of tokens and of prompts between a device's model and the cloud's."""
    checkpoint, there = Checkpoint.open(device), Checkpoint.open(cloud).config
    pairs: Row = {}
    for bundle in map(RouterBundle.open, routers):
        run, bits = Run(work, bundle.manifest.training.seed), bundle.manifest.device.bits
        answers = answers_of(run, LocalCloud(cloud), prompts)
        found = device_choices(run_for(run, checkpoint, bits, answers), checkpoint, bits, answers)
        chosen = sorted(split(len(answers), run.seed)[1])
        test, lengths = found.of(chosen), [len(answers[index].tokens) for index in chosen]
        read = np.array([len(answers[index].prompt) for index in chosen])
        cost = CloudCost(there, read, np.cumsum([0, *lengths[:-1]]))
        pairs[bundle.manifest.name] = measure(
            bundle, test.features_NF.astype(np.float64), test.right_N, test.answer_N, cost, resamples
        ) | {"answers": len(chosen), "tokens": int(sum(lengths))}
        some = [answers[index].prompt for index in chosen[:: -(-len(chosen) // closed_loop)]] if closed_loop else []
        pairs[bundle.manifest.name]["closed_loop"] = run_loop(bundle, checkpoint, cloud, some)
    result: Row = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "pairs": pairs}
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for page in table(result):
        Console().print(page)
    if plot_file:
        plot(result, plot_file)


if __name__ == "__main__":
    main()
