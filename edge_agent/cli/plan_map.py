"""How `edge-agent plan` shows its forecasts: tables, JSON rows, and a map of bandwidth and round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.models.errors import InvalidInput

if TYPE_CHECKING:
    from isthmus.edge_agent.cli.plan import Candidate
    from isthmus.edge_agent.vision.forecast import Expectation

Links = Sequence[tuple[float, float]]


def as_rows(found: Sequence[Candidate], links: Links) -> list[dict[str, Any]]:
    """One row for each device, bundle and precision."""
    return [
        {
            "device": each.device,
            "bundle": each.bundle,
            "precision": each.precision,
            "fits_best": each in best_of_devices(found),
            "links": [
                {"mbit": mbit, "rtt_ms": rtt_ms, **asdict(expected)}
                for (mbit, rtt_ms), expected in zip(links, each.expected, strict=True)
            ],
        }
        for each in found
    ]


def best_of_devices(found: Sequence[Candidate]) -> list[Candidate]:
    """For each device the bundle and precision with the least mean latency over the links."""
    devices = dict.fromkeys(each.device for each in found)
    return [
        min((each for each in found if each.device == device), key=lambda each: each.mean("seconds"))
        for device in devices
    ]


def tables(found: Sequence[Candidate], links: Links) -> list[str]:
    """Lines for people: a table of links for each device's best candidate; before it, where several, the comparison."""
    best = best_of_devices(found)
    lines = []
    if len(found) > 1:
        lines += [f"{'device':<20} {'bundle':<12} {'precision':<9} {'mean ms':>8} {'mean B':>8} {'agreement':>9}"]
        for each in found:
            lines.append(
                f"{each.device:<20.20} {each.bundle:<12.12} {each.precision:<9} {1000 * each.mean('seconds'):>8.1f}"
                f" {each.mean('up_bytes'):>8.0f} {each.mean('agreement'):>9.1%}"
                f"{'  fits best' if each in best else ''}"
            )
        lines.append("")
    for each in best:
        lines += [f"{each.device}, {each.bundle} at {each.precision}: expected of a photo, on average"]
        lines += [f"{'Mbit/s':>7} {'rtt ms':>7} {'ms':>7} {'bytes':>7} {'agreement':>9}  ways"]
        for (mbit, rtt_ms), expected in zip(links, each.expected, strict=True):
            lines.append(
                f"{mbit:>7g} {rtt_ms:>7g} {1000 * expected.seconds:>7.1f} {expected.up_bytes:>7.0f}"
                f" {expected.agreement:>9.1%}  {ways(expected)}"
            )
        lines.append("")
    return lines[:-1]


def ways(expected: Expectation) -> str:
    """For example "exit0 49%, exit1 25%, deep rate 3 26%"."""
    return ", ".join(f"{name} {share:.0%}" for name, share in expected.ways.items() if share > 0)


def draw(found: Sequence[Candidate], links: Links, path: Path) -> None:
    """A map for each device's best candidate: bandwidth across, round trip up, coloured by the way.

    Raises InvalidInput without matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InvalidInput("--plot needs the package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch, Rectangle

    best = best_of_devices(found)
    names = list(dict.fromkeys(expected.way for each in best for expected in each.expected))
    colours = {name: pyplot.get_cmap("tab10")(index % 10) for index, name in enumerate(names)}
    figure, axes = pyplot.subplots(1, len(best), figsize=(5.5 * len(best), 5), layout="constrained", squeeze=False)
    mbits, rtts = (sorted(set(values)) for values in zip(*links, strict=True))
    for axis, each in zip(axes[0], best, strict=True):
        for (mbit, rtt_ms), expected in zip(links, each.expected, strict=True):
            x, y = mbits.index(mbit), rtts.index(rtt_ms)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colours[expected.way], alpha=0.6))
            axis.text(x, y, f"{1000 * expected.seconds:.0f} ms", ha="center", va="center", size=9)
        axis.set_xlim(-0.5, len(mbits) - 0.5)
        axis.set_ylim(-0.5, len(rtts) - 0.5)
        axis.set_xticks(range(len(mbits)), [f"{mbit:g}" for mbit in mbits])
        axis.set_yticks(range(len(rtts)), [f"{rtt:g}" for rtt in rtts])
        axis.set_xlabel("Mbit/s")
        axis.set_ylabel("round trip, ms")
        axis.set_title(f"{each.device}: {each.bundle} at {each.precision}")
    patches = [Patch(color=colours[name], alpha=0.6, label=name) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
