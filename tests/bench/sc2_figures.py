"""Measurements of all methods -> the figures of the comparison, as plain JSON. No I/O.

Quality is accuracy on labels, or agreement with the cloud model on the original photo. Size is counted three ways (see
`sc2_measure`); SC2's is the headline. Fractions, bytes, milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.recipes.common.intervals import interval
from tests.bench.bd_rate import (
    Curves,
    Floats,
    bd_rate,
    bd_rate_at_most,
    bytes_at,
    envelope,
    estimate,
    resampling_weights,
    shared_quality,
)
from tests.bench.sc2_measure import Measured
from tests.bench.sc2_ways import Way

REFERENCE = "entropic-student"
RIVALS = ("n0", "ours-single")  # that ours is also compared with
QUALITIES = ("accuracy", "agreement")
SIZES = ("data_bytes", "payload_bytes", "wire_bytes")
HEADLINE = SIZES[0]
MARGINS = (0.01, 0.02, 0.03, 0.05)  # below the cloud model: qualities at which bytes are compared

Row = dict[str, Any]
MethodCurves = Mapping[tuple[str, str], Curves]  # by quality and size
Results = Mapping[str, Sequence[tuple[Way, Measured]]]  # by method


def compare(results: Results, cloud: Measured, labels_N: NDArray[np.int64], resamples: int) -> Row:
    """Every method's points and curve, each against the reference if that was measured."""
    weights_RN = resampling_weights(len(labels_N), resamples)
    truths = {"accuracy": labels_N, "agreement": cloud.answer_N}
    wanted = {
        quality: (weights_RN @ (cloud.answer_N == truth_N))[:, None] - np.array(MARGINS)
        for quality, truth_N in truths.items()
    }
    curves = {method: curves_of(rows, truths, weights_RN) for method, rows in results.items()}
    reference = curves.get(REFERENCE, {})
    return {
        "n": len(labels_N),
        "resamples": resamples,
        "reference": REFERENCE if reference else None,
        "headline": HEADLINE,
        "cloud_model": {
            "accuracy": interval(cloud.answer_N == labels_N).model_dump(),
            "lossless_bytes": float(cloud.payload_bytes_N.mean()),
            "cloud_ms": float(np.median(cloud.cloud_ms_N)),
        },
        "methods": {
            method: {
                "points": [point(way, measured, truths) for way, measured in rows],
                **curve_figures(curves[method], reference, wanted),
                "against": {rival: rates_against(curves[method], curves[rival]) for rival in RIVALS if rival in curves},
            }
            for method, rows in results.items()
        },
    }


def curve_figures(curves: MethodCurves, reference: MethodCurves, wanted: Mapping[str, Floats]) -> Row:
    """By quality and size: BD-rate, the bound on it, and bytes at a few qualities."""
    return {
        "bd_rate_at_most": {
            quality: {size: at_most(curves[quality, size], reference.get((quality, size))) for size in SIZES}
            for quality in QUALITIES
        },
        "bd_rate": {
            quality: {size: against(curves[quality, size], reference.get((quality, size))) for size in SIZES}
            for quality in QUALITIES
        },
        "bytes_at": {
            quality: {
                size: at_margins(curves[quality, size], reference.get((quality, size)), wanted[quality])
                for size in SIZES
            }
            for quality in QUALITIES
        },
    }


def rates_against(curves: MethodCurves, rival: MethodCurves) -> Row:
    """BD-rate of the headline's bytes by quality, and the bound on it."""
    return {
        quality: {
            "bd_rate": against(curves[quality, HEADLINE], rival[quality, HEADLINE]),
            "bd_rate_at_most": at_most(curves[quality, HEADLINE], rival[quality, HEADLINE]),
        }
        for quality in QUALITIES
    }


def curves_of(
    rows: Sequence[tuple[Way, Measured]], truths: Mapping[str, NDArray[np.int64]], weights_RN: Floats
) -> MethodCurves:
    """A method's curve for each quality over each size."""
    made = {}
    for quality, truth_N in truths.items():
        right_SN = np.array([measured.answer_N == truth_N for _, measured in rows], dtype=np.float64)
        for size in SIZES:
            bytes_SN = np.array([getattr(measured, f"{size}_N") for _, measured in rows], dtype=np.float64)
            made[quality, size] = envelope(weights_RN @ bytes_SN.T, weights_RN @ right_SN.T)
    return made


def point(way: Way, measured: Measured, truths: Mapping[str, NDArray[np.int64]]) -> Row:
    """One setting of a method: its costs and its quality."""
    decode_ms = float(np.median(measured.decode_ms_N))
    return {
        "setting": way.setting,
        "encoder_kb": way.encoder_bits / 8 / 1024,
        "encoder_macs": way.encoder_macs,
        **{size: float(getattr(measured, f"{size}_N").mean()) for size in SIZES},
        **{quality: interval(measured.answer_N == truth_N).model_dump() for quality, truth_N in truths.items()},
        "encode_ms": float(np.median(measured.encode_ms_N)),
        "decode_ms": None if np.isnan(decode_ms) else decode_ms,
        "cloud_ms": float(np.median(measured.cloud_ms_N)),
    }


def against(curve: Curves, reference: Curves | None) -> Row | None:
    """BD-rate with its interval, and the qualities that both curves share in the sample itself."""
    if reference is None:
        return None
    low_R, high_R = shared_quality(curve, reference)
    shared = [float(low_R[0]), float(high_R[0])] if low_R[0] < high_R[0] else None
    return {**asdict(estimate(bd_rate(curve, reference))), "shared_quality": shared}


def at_most(curve: Curves, reference: Curves | None) -> Row | None:
    """The bound on BD-rate, which exists without shared quality too."""
    return None if reference is None else asdict(estimate(bd_rate_at_most(curve, reference)))


def at_margins(curve: Curves, reference: Curves | None, wanted_RQ: Floats) -> list[Row]:
    """Bytes at MARGINS below the cloud model, and their ratio to the reference's; None where that is not reached."""
    bytes_RQ = bytes_at(curve, wanted_RQ)
    ratio_RQ = bytes_RQ / bytes_at(reference, wanted_RQ) if reference else None
    return [
        {
            "below_cloud": margin,
            "bytes": asdict(estimate(bytes_RQ[:, index])),
            "ratio": None if ratio_RQ is None else asdict(estimate(ratio_RQ[:, index])),
        }
        for index, margin in enumerate(MARGINS)
    ]
