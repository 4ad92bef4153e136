"""The picture of the router's benchmark: a heat map for each device and cloud, and latency over time on each trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORST, BEST = 1.3, 0.3  # ratios at the ends of the colours


def plot(result: dict[str, Any], path: Path) -> None:
    """Above: the router's mean latency over the best arm's; below: its latency on links that change."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(cell["device"], cell["cloud"]) for cell in result["cells"]})
    columns = max(len(panels), len(result["traces"]))
    figure, axes = pyplot.subplots(2, columns, figsize=(4.6 * columns, 8), layout="constrained", squeeze=False)
    image = None
    for axis, (device, cloud) in zip(axes[0], panels, strict=False):
        chosen = [cell for cell in result["cells"] if (cell["device"], cell["cloud"]) == (device, cloud)]
        image = heat_map(axis, chosen)
        axis.set_title(f"device {device}x slower, cloud {cloud}x slower")
    figure.colorbar(image, ax=axes[0, -1], label="mean latency, router / best arm in hindsight")
    for axis, (name, trace) in zip(axes[1], result["traces"].items(), strict=False):
        started_s, took_ms = np.array(trace["router_ms"]).T
        axis.semilogy(started_s, took_ms, ".", ms=3)
        axis.set_title(f"router, trace: {name}")
        axis.set_xlabel("s")
        axis.set_ylabel("ms a photo")
    for axis in [*axes[0, len(panels) :], *axes[1, len(result["traces"]) :]]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def heat_map(axis: Any, cells: list[dict[str, Any]]) -> Any:
    """One panel: round trip down, bandwidth across, the ratio and the milliseconds of the router in each cell."""
    mbits, rtts = sorted({cell["mbit"] for cell in cells}), sorted({cell["rtt_ms"] for cell in cells})
    ratio_RM = np.full((len(rtts), len(mbits)), np.nan)
    for cell in cells:
        row, column = rtts.index(cell["rtt_ms"]), mbits.index(cell["mbit"])
        ratio_RM[row, column] = np.nan if cell["ratio"] is None else cell["ratio"]
        text = "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}"
        axis.text(column, row, f"{text}\n{cell['runs']['router']['mean_ms']:.0f} ms", ha="center", va="center", size=8)
    image = axis.imshow(ratio_RM, vmin=BEST, vmax=WORST, cmap="RdYlGn_r", aspect="auto")
    axis.set_xticks(range(len(mbits)), [f"{mbit:g}" for mbit in mbits])
    axis.set_yticks(range(len(rtts)), [str(rtt) for rtt in rtts])
    axis.set_xlabel("Mbit/s")
    axis.set_ylabel("round trip, ms")
    return image
