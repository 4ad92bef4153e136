from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bench.sc2_figures import compare
from tests.bench.sc2_report import COLOURS, bounded, change, plot, rank, spread, style, table
from tests.unit.bench.fakes import measured, way

LABELS = np.arange(100) % 2
NAMES = ("ours", "ours light 0.5", "ours deep", "ours deeper", "ours deeper 0.5", "jpeg", "entropic-student", "bq")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    rng, cloud = np.random.default_rng(0), measured(LABELS, 9_000)
    results = {}
    for number, name in enumerate(NAMES):
        answers = [np.where(rng.random(100) < share, LABELS, 1 - LABELS) for share in (0.8, 0.9, 0.95)]
        bits = 0 if name == "jpeg" else 8192 * (number + 1)
        results[name] = [
            (way(name, f"s{i}", encoder_bits=bits * (i + 1 if name == "bq" else 1)), measured(answer_N, 100 * 2**i))
            for i, answer_N in enumerate(answers)
        ]
    return {"machine": "x86_64, 2 cores, 1 used", "bundle": "00", **compare(results, cloud, LABELS, 100)}


def test_a_table_has_a_row_for_each_method(result: dict[str, Any]) -> None:
    head, rule, *rows, blank, caption = table(result).splitlines()
    assert head.startswith("| method | encoder KB | MMACs |") and blank == ""
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert set(cells) == set(NAMES) and rows[-1].startswith("| ours |") and rows[0].startswith("| jpeg |")
    assert cells["jpeg"][0] == "–" and cells["ours"][0] == "1.0" and cells["bq"][0] == "8.0–24"
    assert cells["entropic-student"][-2:] == ["reference", "reference"]
    assert "%" in cells["ours"][-1] and "[" in cells["ours"][-1]
    assert "100 photos" in caption and "against entropic-student" in caption


@pytest.mark.parametrize(
    ("values", "text"),
    [([0, 0], "–"), ([12.4, 12.4], "12"), ([1234567.0], "1,234,567"), ([0.25], "0.2"), ([1.25, 300], "1.2–300")],
)
def test_spreads(values: list[float], text: str) -> None:
    assert spread(values) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (None, "–"),
        ((None, None, None, 1.0), "no overlap"),
        ((-0.25, None, None, 1.0), "-25% (no overlap in 100%)"),
        ((-0.25, -0.5, 0.125, 0.0), "-25% [-50%, +12%]"),
        ((-0.25, -0.5, 0.0, 0.2), "-25% [-50%, +0%] (no overlap in 20%)"),
    ],
)
def test_figures_with_their_intervals(figure: tuple[float | None, ...] | None, text: str) -> None:
    row = figure and dict(zip(("value", "low", "high", "undefined"), figure, strict=True))
    assert bounded(row or None, "{:+.0%}", "no overlap") == text


def test_taps_have_colours_of_their_own_and_widths_share_them(result: dict[str, Any]) -> None:
    styles = {name: style(name, result) for name in NAMES}
    assert styles["ours light 0.5"] == (COLOURS["ours"], True) and styles["ours"] == (COLOURS["ours"], False)
    assert styles["ours deeper 0.5"] == (styles["ours deeper"][0], True)
    assert len({styles[name][0] for name in ("ours", "ours deep", "ours deeper", "jpeg", "bq")}) == 5
    assert max(NAMES, key=rank) == "ours", "drawn last, labelled first"


@pytest.mark.parametrize("names", [NAMES, ("jpeg",), ("ours",)])
def test_a_picture_is_drawn_of_any_methods(result: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "made" / "sc2.png"
    plot({**result, "methods": {name: result["methods"][name] for name in names}}, path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1200
        pixels_HW3 = np.asarray(image.convert("RGB")).astype(int)
    if "ours" in names:
        blue = np.abs(pixels_HW3 - [int(COLOURS["ours"][i : i + 2], 16) for i in (1, 3, 5)]).max(2) < 12
        assert blue[:, : image.width // 2].sum() > 100 and blue[:, image.width // 2 :].sum() > 100


def test_a_bound_stands_in_for_a_figure_that_is_none_and_says_so() -> None:
    none = {"value": None, "low": None, "high": None, "undefined": 1.0}
    found = {"value": -0.4, "low": -0.5, "high": -0.3, "undefined": 0.0}
    assert change(none, found) == "≤ -40% [-50%, -30%]"
    assert change(found, {**found, "value": -0.2}) == "-40% [-50%, -30%]"
    assert change(none, none) == "no overlap"
    assert change(None, None) == "–"
