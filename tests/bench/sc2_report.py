"""The comparison's JSON as a Markdown table and as a picture. Knows nothing about measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.bd_rate import Floats, envelope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

COLUMNS = (
    "method | encoder KB | MMACs | encode ms | cloud ms | B at cloud − 1 point | BD-rate, accuracy | BD-rate, agreement"
)
COLOURS = {
    "jpeg": "#8c8c8c",
    "webp": "#6b6b6b",
    "avif": "#3f3f3f",
    "bq": "#9467bd",
    "entropic-student": "#d62728",
    "n0": "#2ca02c",
    "n4": "#146b14",
    "ours-single": "#17a2b8",
    "ours": "#0b5fd8",
}
OTHER_TAPS = ("#e07b00", "#b0478f", "#7a5c00")  # of ours; narrower widths have thinner lines in their tap's colour
ORDER = tuple(COLOURS)
POINTS_BELOW = {"accuracy": 16, "agreement": 22}  # percentage points below the best at which the axis starts
# Offsets of a label from the end of its curve, in points, nearest first.
OFFSETS = [(dx, dy) for dy in (0, 8, -8, 16, -16, 24, -24) for dx in (6, -6)]


def table(result: Row) -> str:
    """One line a method, ready for a README."""
    lines = [f"| {COLUMNS} |", "|---" + "|---:" * COLUMNS.count("|") + "|"]
    lines += [f"| {' | '.join(cells(name, result))} |" for name in sorted(result["methods"], key=rank)]
    n, cloud = result["n"], result["cloud_model"]["accuracy"]
    against = f" BD-rate against {result['reference']}." if result["reference"] else ""
    caption = (
        f"{n} photos; cloud model {cloud['value']:.1%} [{cloud['low']:.1%}, {cloud['high']:.1%}] on them.{against}"
    )
    caption += f" Bytes as SC2 counts them, 95 % intervals, {result['machine']}."
    return "\n".join([*lines, "", caption, *rival_lines(result)])


def rival_lines(result: Row) -> list[str]:
    """BD-rates of each of our curves against each of RIVALS."""
    lines = []
    for name, method in result["methods"].items():
        for rival, found in method["against"].items() if name.startswith("ours") and name != "ours-single" else ():
            rates = (f"{quality} {change(row['bd_rate'], row['bd_rate_at_most'])}" for quality, row in found.items())
            lines.append(f"{name} against {rival}: {', '.join(rates)}")
    return lines


def cells(name: str, result: Row) -> list[str]:
    method, size = result["methods"][name], result["headline"]
    points, reached = method["points"], method["bytes_at"]["accuracy"][size][0]["bytes"]
    rates = [
        change(method["bd_rate"][quality][size], method["bd_rate_at_most"][quality][size])
        for quality in ("accuracy", "agreement")
    ]
    return [
        name,
        spread([point["encoder_kb"] for point in points]),
        spread([point["encoder_macs"] / 1e6 for point in points]),
        f"{np.median([point['encode_ms'] for point in points]):.1f}",
        f"{np.median([point['cloud_ms'] for point in points]):.1f}",
        bounded(reached, "{:,.0f}", "not reached"),
        *(["reference"] * 2 if name == result["reference"] else rates),
    ]


def change(figure: Row | None, bound: Row | None) -> str:
    """A BD-rate, or if undefined the bound on it, marked with ≤."""
    if figure is None or bound is None or figure["value"] is not None or bound["value"] is None:
        return bounded(figure, "{:+.0%}", "no overlap")
    return f"≤ {bounded(bound, '{:+.0%}', 'no overlap')}"


def spread(values: list[float]) -> str:
    """The value of all settings, or their range where they differ."""
    low, high = (f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in (min(values), max(values)))
    return "–" if max(values) == 0 else low if low == high else f"{low}–{high}"


def bounded(figure: Row | None, form: str, undefined: str) -> str:
    """A figure with its interval and the share of undefined resamples; `undefined` where there is no figure."""
    if figure is None:
        return "–"
    share = f" ({undefined} in {figure['undefined']:.0%})" if figure["undefined"] >= 0.005 else ""
    if figure["value"] is None:
        return undefined
    if figure["low"] is None:
        return form.format(figure["value"]) + share
    return f"{form.format(figure['value'])} [{form.format(figure['low'])}, {form.format(figure['high'])}]{share}"


def plot(result: Row, path: Path) -> None:
    """Accuracy and agreement against bytes a photo; lines are envelopes of the methods, dots their settings."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10.5, 4.7), layout="constrained")
    for axes, quality in zip(figure.subplots(1, 2), ("accuracy", "agreement"), strict=True):
        best = max(point[quality]["value"] for m in result["methods"].values() for point in m["points"])
        ceiling = result["cloud_model"]["accuracy"]["high"] if quality == "accuracy" else 1.0
        axes.set_ylim(100 * best - POINTS_BELOW[quality], 100 * max(best, ceiling) + 1)
        for name in sorted(result["methods"], key=rank):
            draw(axes, name, result, quality)
        axes.set(xscale="log", xlabel="bytes a photo, as SC2 counts them")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, lw=0.5)
    left, right = figure.axes
    draw_cloud(left, result["cloud_model"]["accuracy"])
    right.axhline(100, color="black", lw=1, ls="--")
    left.set_ylabel("accuracy on labels, %")
    right.set_ylabel("agreement with the cloud model, %")
    figure.draw_without_rendering()  # labels need the final layout
    for axes, quality in zip(figure.axes, ("accuracy", "agreement"), strict=True):
        place_labels(axes, result, quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_cloud(axes: Axes, accuracy: Row) -> None:
    """The cloud model on original photos, with its interval."""
    axes.axhspan(100 * accuracy["low"], 100 * accuracy["high"], color="black", alpha=0.07, lw=0)
    axes.axhline(100 * accuracy["value"], color="black", lw=1, ls="--")
    axes.annotate(
        "cloud model, original photos, 95 %", (0.99, 100 * accuracy["high"]), (0, -7),
        xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7.5, ha="right",
    )  # fmt: skip


def draw(axes: Axes, name: str, result: Row, quality: str) -> None:
    """One method's curve, and all its settings as dots."""
    colour, narrow = style(name, result)
    main = name == "ours"
    over = 5 if main else 3
    axes.plot(*curve(name, result, quality), "-", color=colour, lw=2.6 if main else 0.8 if narrow else 1.5, zorder=over)
    points = result["methods"][name]["points"]
    sizes, qualities = [p[result["headline"]] for p in points], [100 * p[quality]["value"] for p in points]
    axes.plot(sizes, qualities, "o", color=colour, ms=4.5 if main else 2.2, zorder=over)


def curve(name: str, result: Row, quality: str) -> tuple[Floats, Floats]:
    """A method's envelope: bytes and quality in %."""
    points = result["methods"][name]["points"]
    sizes, qualities = ([p[result["headline"]] for p in points], [100 * p[quality]["value"] for p in points])
    found = envelope(np.array([sizes], dtype=float), np.array([qualities]))
    return np.exp2(found.log2_bytes_RS[0]), found.quality_RS[0]


def style(name: str, result: Row) -> tuple[str, bool]:
    """A method's colour, and whether it is a narrower width of a tap, which shares its tap's colour."""
    if name in COLOURS:
        return COLOURS[name], False
    _, tap, *width = name.split()
    others = [name for name in result["methods"] if name.startswith("ours ") and len(name.split()) == 2]
    if f"ours {tap}" not in others:  # the first tap, whose widest is `ours` alone
        return COLOURS["ours"], True
    return OTHER_TAPS[others.index(f"ours {tap}") % len(OTHER_TAPS)], bool(width)


def place_labels(axes: Axes, result: Row, quality: str) -> None:
    """Names at the upper ends of the curves, ours first, without overlap; of narrower widths at the lower ends."""
    from matplotlib.patheffects import withStroke

    taken: list[Any] = []
    for name in sorted(result["methods"], key=rank, reverse=True):
        colour, narrow = style(name, result)
        x, y = curve(name, result, quality)
        seen = np.flatnonzero(y >= axes.get_ylim()[0])
        if not len(seen):
            continue
        end = seen[0] if narrow else seen[-1]
        label = axes.annotate(
            f"× {name.split()[-1]}" if narrow else name, (x[end], y[end]), (0, 0), textcoords="offset points",
            color=colour, fontsize=7 if narrow else 8.5, fontweight="bold" if name == "ours" else "normal", va="center",
            zorder=6, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        for dx, dy in [(-dx, dy) for dx, dy in OFFSETS] if narrow else OFFSETS:
            label.set(position=(dx, dy), ha="left" if dx > 0 else "right")
            box = label.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def rank(name: str) -> tuple[int, str]:
    """Order of methods: image codecs, other bottlenecks, other taps and widths of ours, ours."""
    return (ORDER.index(name) if name in ORDER else ORDER.index("ours")), f"~{name}" if name == "ours" else name
