"""The main job on real photos: a device inspects solar cells over a thin link, with four configurations side by side.

A real cloud process, and four agents of one device, each with its own emulated link. Every photo of a sample of the
ELPV test part goes through all arms in turn, so that other load on the machine affects all of them alike. There is no
warm-up beyond the service's own: the first upload pays for opening its stream.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from isthmus.edge_agent import Answer, EdgeAgent, EdgeConfig
from isthmus.edge_agent.config import WholeImage
from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.vision.elpv_data import Photos, load
from tests.bench.processes import ROOT, CloudProcess
from tests.bench.proxy import LinkProxy, LinkSpec

BUNDLE = ROOT / "models" / "zoo" / "elpv"
DEADLINE_S = 2.0
TITLES = {
    "edge_only": "edge only",
    "offload_jpeg75": "whole image, JPEG q75",
    "offload_webp75": "whole image, WebP q75",
    "isthmus": "Isthmus",
}


@dataclass
class Arm:
    """One configuration of the agent, and its answers."""

    name: str
    config: EdgeConfig
    proxy: LinkProxy
    agent: EdgeAgent
    answers: list[Answer] = field(default_factory=list)


def configs(bundle: Path) -> dict[str, EdgeConfig]:
    """The configuration of each arm, without a cloud."""
    base = {"bundle": bundle, "deadline_s": DEADLINE_S}
    return {
        "edge_only": EdgeConfig(**base, mode="edge"),
        "offload_jpeg75": EdgeConfig(**base, mode="offload", whole_image=WholeImage("jpeg", 75)),
        "offload_webp75": EdgeConfig(**base, mode="offload", whole_image=WholeImage("webp", 75)),
        "isthmus": EdgeConfig(**base),
    }


def open_arm(stack: ExitStack, name: str, config: EdgeConfig, cloud: CloudProcess, spec: LinkSpec) -> Arm:
    """An agent with a link of its own to the cloud."""
    proxy = stack.enter_context(LinkProxy(cloud.port, spec))
    connected = replace(config, clouds=() if config.mode == "edge" else (f"127.0.0.1:{proxy.port}",))
    return Arm(name, connected, proxy, stack.enter_context(EdgeAgent(connected)))


def sample(count: int) -> tuple[Sequence[Path], NDArray[np.int64]]:
    """Paths of `count` photos of the test part, drawn with a fixed seed, and their labels."""
    photos: Photos = load("test")
    chosen = np.random.default_rng(0).permutation(len(photos))[:count]
    return [photos.paths[index] for index in chosen], photos.labels_N[chosen]


def cloud_answers(paths: Sequence[Path], bundle: Path, cloud: CloudProcess) -> NDArray[np.int64]:
    """The cloud model's answers to the original photos: sent losslessly, without the emulated link."""
    config = EdgeConfig(bundle, (cloud.target,), "offload", deadline_s=30.0, whole_image=WholeImage("png"))
    with EdgeAgent(config) as agent:
        answers = [agent.infer(path) for path in track(paths, "cloud model", console=console(), transient=True)]
    if any(answer.degraded for answer in answers):
        raise IsthmusError("the cloud model did not answer every photo on loopback")
    return np.array([answer.index for answer in answers])


def run(paths: Sequence[Path], arms: Sequence[Arm]) -> None:
    """Every photo through every arm; the first arm changes from photo to photo."""
    for turn, path in enumerate(track(paths, "photos x arms", console=console(), transient=True)):
        for step in range(len(arms)):
            arm = arms[(turn + step) % len(arms)]
            arm.answers.append(arm.agent.infer(path))


def figures(arm: Arm, labels_N: NDArray[np.int64], cloud_N: NDArray[np.int64]) -> dict[str, Any]:
    """One row of the table. Bytes are messages with our framing; `wire` adds HTTP/2, connection set-up and probes."""
    answers = arm.answers
    index_N = np.array([answer.index for answer in answers])
    up_N = np.array([answer.bytes_up for answer in answers])
    total_N = np.array([answer.stage_ms["total"] for answer in answers])
    uploads = int((up_N > 0).sum())
    return {
        "accuracy": float((index_N == labels_N).mean()),
        "accuracy_95": list(interval(index_N == labels_N).model_dump(include={"low", "high"}).values()),
        "agreement": float((index_N == cloud_N).mean()),
        "bytes_up_per_image": float(up_N.mean()),
        "bytes_up_per_upload": float(up_N.sum() / uploads) if uploads else 0.0,
        "wire_bytes_up_per_image": arm.proxy.up.bytes / len(answers),
        "cloud_share": uploads / len(answers),
        "points": Counter(f"{a.tap} {a.width:g} rate {a.rate}" for a in answers if a.width is not None),
        "degraded": sum(answer.degraded for answer in answers),
        "latency_ms": {
            "mean": float(total_N.mean()),
            "p50": float(np.percentile(total_N, 50)),
            "p99": float(np.percentile(total_N, 99)),
        },
        "cost": float(1000 * np.mean([answer.cost_usd for answer in answers])),
    }


def table(result: dict[str, Any]) -> Table:
    n, link = result["n"], result["link"]
    rate = f"{link['mbit']:g} Mbit/s" if link["mbit"] else "unlimited"
    made = Table(
        title=f"{n} ELPV test photos, {rate}, {link['rtt_ms']:g} ms round trip; cloud model "
        f"{result['cloud_model']['accuracy']:.1%} on them"
    )
    columns = (
        "accuracy",
        "agreement",
        "B/photo",
        "B/upload",
        "wire B/photo",
        "to cloud",
        "mean ms",
        "p50",
        "p99",
        "$/1000",
    )
    made.add_column("arm")
    for column in columns:
        made.add_column(column, justify="right")
    for name, row in result["arms"].items():
        latency = row["latency_ms"]
        made.add_row(
            TITLES[name],
            f"{row['accuracy']:.1%}",
            f"{row['agreement']:.1%}",
            f"{row['bytes_up_per_image']:.0f}",
            f"{row['bytes_up_per_upload']:.0f}",
            f"{row['wire_bytes_up_per_image']:.0f}",
            f"{row['cloud_share']:.0%}",
            *(f"{latency[key]:.0f}" for key in ("mean", "p50", "p99")),
            f"{row['cost']:.5f}",
        )
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against bytes a photo, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = {
        "edge_only": "tab:gray",
        "offload_jpeg75": "tab:orange",
        "offload_webp75": "tab:purple",
        "isthmus": "tab:blue",
    }
    for name, row in result["arms"].items():
        low, high = row["accuracy_95"]
        errors = [[100 * (row["accuracy"] - low)], [100 * (high - row["accuracy"])]]
        size = row["bytes_up_per_image"]
        axes.errorbar(
            max(size, 10), 100 * row["accuracy"], yerr=errors, fmt="o", ms=9, capsize=4, color=colours[name],
            label=f"{TITLES[name]}: {size:.0f} B, {row['latency_ms']['mean']:.0f} ms mean",
        )  # fmt: skip
    axes.axhline(
        100 * result["cloud_model"]["accuracy"], ls="--", color="black", lw=1, label="cloud model, original photos"
    )
    axes.set_xscale("log")
    axes.set_xlim(8, 20_000)
    axes.set_xlabel("bytes sent per photo (nothing sent is drawn at 10)")
    axes.set_ylabel("accuracy on labels, %")
    link = result["link"]
    axes.set_title(f"Solar-cell inspection, {result['n']} test photos, {link['mbit']:g} Mbit/s, {link['rtt_ms']:g} ms")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def console() -> Console:
    return Console(stderr=True)


def demo(count: int, spec: LinkSpec, bundle: Path) -> dict[str, Any]:
    """The whole comparison, as `--json` writes it."""
    paths, labels_N = sample(count)
    with ExitStack() as stack:
        cloud = stack.enter_context(CloudProcess(bundle))
        cloud_N = cloud_answers(paths, bundle, cloud)
        arms = [open_arm(stack, name, config, cloud, spec) for name, config in configs(bundle).items()]
        run(paths, arms)
        rows = {arm.name: figures(arm, labels_N, cloud_N) for arm in arms}
    return {
        "n": len(paths),
        "link": {"mbit": spec.rate_bps / 1e6 if spec.rate_bps else None, "rtt_ms": 1000 * spec.rtt_s},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; device and cloud share them",
        "cloud_model": {"accuracy": float((cloud_N == labels_N).mean())},
        "arms": rows,
    }


@click.command(epilog="Example: python -m tests.bench.demo --photos 200 --mbit 2 --rtt-ms 40 --json runs/demo.json")
@click.option("--photos", default=200, show_default=True, type=click.IntRange(1, 542))
@click.option("--mbit", default=2.0, show_default=True, type=click.FloatRange(0), help="Link rate; 0 for unlimited.")
@click.option("--rtt-ms", default=40.0, show_default=True, type=click.FloatRange(0, 10_000))
@click.option("--bundle", default=BUNDLE, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the picture here (PNG).")
def main(photos: int, mbit: float, rtt_ms: float, bundle: Path, json_path: Path | None, plot_path: Path | None) -> None:
    """Compare four configurations that inspect solar cells over an emulated link."""
    try:
        result = demo(photos, LinkSpec(mbit * 1e6 or None, rtt_ms / 1000), bundle)
    except (IsthmusError, RuntimeError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    Console(width=150 if not sys.stdout.isatty() else None).print(table(result))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_path}")
    if plot_path:
        plot(result, plot_path)
        click.echo(f"picture: {plot_path}")


if __name__ == "__main__":
    main()
