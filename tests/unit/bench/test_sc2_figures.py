from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.bench.bd_rate import Floats
from tests.bench.sc2_figures import HEADLINE, MARGINS, QUALITIES, SIZES, compare
from tests.bench.sc2_measure import Measured
from tests.bench.sc2_ways import Way
from tests.unit.bench.fakes import measured, way

N = 300
LABELS = np.arange(N) % 2
CLOUD = measured(np.where(np.arange(N) < 0.9 * N, LABELS, 1 - LABELS), 40_000)  # right on nine in ten


def agreeing(share: float, seed: int) -> Floats:
    """Answers of which `share` are the cloud model's."""
    same = np.random.default_rng(seed).permutation(N) < share * N
    return np.where(same, CLOUD.answer_N, 1 - CLOUD.answer_N).astype(float)


def method(name: str, scale: float) -> list[tuple[Way, Measured]]:
    settings = [(200, 0.8), (400, 0.9), (800, 0.95), (1600, 1.0)]
    return [
        (way(name, f"s{i}", encoder_bits=8192 * 5), measured(agreeing(share, i), scale * size))
        for i, (size, share) in enumerate(settings)
    ]


def test_half_the_payload_of_the_reference() -> None:
    results = {"entropic-student": method("entropic-student", 1), "n0": method("n0", 0.5)}
    found = compare(results, CLOUD, LABELS, 200)
    assert found["reference"] == "entropic-student" and found["n"] == N and found["resamples"] == 200
    bd_rate = found["methods"]["n0"]["bd_rate"]
    for quality in QUALITIES:
        half = bd_rate[quality]["payload_bytes"]
        assert half["value"] == pytest.approx(-0.5) and half["low"] == pytest.approx(half["high"])
        assert half["undefined"] == 0 and half["shared_quality"][0] < half["shared_quality"][1]
        wire, data = (bd_rate[quality][size]["value"] for size in ("wire_bytes", "data_bytes"))
        assert -0.5 < wire < data < 0, "what is added to every payload dilutes the saving"
        assert found["methods"]["entropic-student"]["bd_rate"][quality][HEADLINE]["value"] == 0
    for row in found["methods"]["n0"]["bytes_at"]["agreement"]["payload_bytes"]:
        assert row["ratio"]["value"] == pytest.approx(0.5)
    json.dumps(found, allow_nan=False)


def test_bytes_near_the_cloud_model_by_hand() -> None:
    """5 points below full agreement is the setting of 800 B; 2 points below lie between it and 1600 B."""
    rows = compare({"n0": method("n0", 1)}, CLOUD, LABELS, 100)["methods"]["n0"]["bytes_at"]["agreement"]
    assert [row["below_cloud"] for row in rows["payload_bytes"]] == list(MARGINS)
    assert rows["payload_bytes"][3]["bytes"]["value"] == pytest.approx(800)
    assert rows["payload_bytes"][1]["bytes"]["value"] == pytest.approx(800 * 2**0.6)
    assert rows["data_bytes"][3]["bytes"]["value"] == pytest.approx(904)


def test_without_the_reference_nothing_is_compared_with_it() -> None:
    found = compare({"n0": method("n0", 1)}, CLOUD, LABELS, 100)
    assert found["reference"] is None
    figures = found["methods"]["n0"]
    assert {figures["bd_rate"][quality][size] for quality in QUALITIES for size in SIZES} == {None}
    assert all(row["ratio"] is None for row in figures["bytes_at"]["accuracy"][HEADLINE])


def test_a_method_out_of_reach_is_null_and_says_how_often() -> None:
    weak = [(way("bq", f"s{i}"), measured(agreeing(share, i), 100 + i)) for i, share in enumerate((0.5, 0.6))]
    found = compare({"entropic-student": method("entropic-student", 1), "bq": weak}, CLOUD, LABELS, 100)
    figure = found["methods"]["bq"]["bd_rate"]["agreement"][HEADLINE]
    assert figure == {"value": None, "low": None, "high": None, "undefined": 1.0, "shared_quality": None}
    assert found["methods"]["bq"]["bytes_at"]["agreement"][HEADLINE][0]["bytes"]["value"] is None
    json.dumps(found, allow_nan=False)


def test_points_say_what_a_setting_costs_and_gives() -> None:
    timed = (way("n0", "with", encoder_bits=8192 * 3, encoder_macs=7), measured(agreeing(0.9, 0), 500, decode_ms=4.0))
    found: dict[str, Any] = compare({"n0": [*method("n0", 1), timed]}, CLOUD, LABELS, 100)
    *_, undecoded, point = found["methods"]["n0"]["points"]
    assert point["setting"] == "with" and point["encoder_kb"] == 3 and point["encoder_macs"] == 7
    assert (point["payload_bytes"], point["data_bytes"], point["wire_bytes"]) == (500, 604, 530)
    assert (point["encode_ms"], point["decode_ms"], point["cloud_ms"]) == (2, 4, 20) and undecoded["decode_ms"] is None
    agreement = point["agreement"]
    assert agreement["value"] == pytest.approx(0.9) and agreement["samples"] == N
    assert agreement["low"] < 0.9 < agreement["high"]
    assert found["cloud_model"]["accuracy"]["value"] == pytest.approx(0.9)
    assert found["cloud_model"]["lossless_bytes"] == 40_000


def test_methods_are_resampled_together() -> None:
    """Two methods that fail on the same photos differ by their bytes alone, whatever is drawn."""
    noisy = [(way("n4", f"s{i}"), measured(agreeing(s, i), 70 * 2**i)) for i, s in enumerate((0.8, 0.9, 0.95))]
    twice = [(way("entropic-student", w.setting), measured(m.answer_N, 2 * m.payload_bytes_N[0])) for w, m in noisy]
    found = compare({"n4": noisy, "entropic-student": twice}, CLOUD, LABELS, 300)
    figure = found["methods"]["n4"]["bd_rate"]["accuracy"]["payload_bytes"]
    assert figure["low"] == pytest.approx(-0.5) and figure["high"] == pytest.approx(-0.5)
