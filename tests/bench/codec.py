"""The entropy coder compared with CompressAI's, on the latents of real photos; one thread.

Compared with CompressAI's EntropyBottleneck, `compress` plus `decompress`, whose table for each channel is fitted to
the measured integers themselves; and with its rANS coder using our priors in our order, so that both code the same
integers with the same tables.

speedup_…: median over all photos and rates. overhead_vs_ideal: mean bytes over mean code length of the frozen tables,
less one, at the worst rate. bytes_vs_factorized: mean bytes over EntropyBottleneck's, averaged over rates.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.codecs.context_model import Integers
from isthmus.models.codecs.phase_order import PhaseOrder
from isthmus.models.recipes.common.fit_bank import frequencies
from isthmus.models.recipes.vision.compressai_entropy import EntropyBottleneck, new_prior
from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import open_image, preprocess
from tests.bench.processes import ROOT
from tests.bench.sc2_ways import uncapped

REPEATS = 7
UNSEEN = 0.01  # pseudo-count of every integer in a channel's range

Floats = NDArray[np.float32]


class SameTables:
    """CompressAI's rANS coder with a contextual codec's priors, phase by phase."""

    def __init__(self, codec: ContextualCodec, rate: int) -> None:
        self._codec, self._rate = codec, rate
        coder = new_prior(1).entropy_coder
        self._encoder, self._decoder = coder._encoder, coder._decoder
        bank, total = codec.tables.bank(), 1 << 16
        # CompressAI's last symbol is its escape; here it has probability 0, so it is never read.
        cdfs_T = [[0, *np.cumsum(frequencies).tolist(), total] for frequencies in bank]
        cdfs_E = [cdfs_T[table] for table in codec.tables.table_E.tolist()]
        self._tables = (cdfs_E, [len(cdf) for cdf in cdfs_E], codec.tables.first_E.tolist())

    def encode(self, integers_CHW: Integers) -> bytes:
        """CompressAI's bytes for our integers, in the same order with the same tables."""
        priors: list[int] = []
        integers: list[int] = []
        for order, symbols_N in self._codec.to_phases(integers_CHW, self._rate):
            priors += order.priors_N.tolist()
            integers += (symbols_N + order.first_N).tolist()
        data: bytes = self._encoder.encode_with_indexes(integers, priors, *self._tables)
        return data

    def decode(self, data: bytes) -> Integers:
        """The inverse of `encode`."""
        self._decoder.set_stream(data)

        def read(order: PhaseOrder) -> Integers:
            integers_N = np.array(self._decoder.decode_stream(order.priors_N.tolist(), *self._tables), np.int32)
            return integers_N - order.first_N

        return self._codec.from_phases(read, self._rate)


def factorized_coder(integers_NCHW: Integers) -> EntropyBottleneck:
    """CompressAI's coder with one table a channel, fitted to these integers."""
    channels = integers_NCHW.shape[1]
    low_C, high_C = integers_NCHW.min((0, 2, 3)), integers_NCHW.max((0, 2, 3))
    cdf_CL = np.zeros((channels, int((high_C - low_C).max()) + 3), np.int32)
    for channel, (low, high) in enumerate(zip(low_C.tolist(), high_C.tolist(), strict=True)):
        counts = np.bincount(
            (integers_NCHW[:, channel] - low).ravel(), minlength=high - low + 2
        )  # the last: the escape
        cdf_CL[channel, 1 : len(counts) + 1] = np.cumsum(frequencies(counts + UNSEEN))
    coder = EntropyBottleneck(channels)
    coder._quantized_cdf = torch.from_numpy(cdf_CL)
    coder._offset = torch.from_numpy(low_C.astype(np.int32))
    coder._cdf_length = torch.from_numpy((high_C - low_C + 3).astype(np.int32))
    return coder


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of a few runs."""
    times = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_s)
    return 1000 * float(np.median(times))


def compare(
    codec: ContextualCodec, rate: int, factorized: EntropyBottleneck, same: SameTables, integers_CHW: Integers
) -> dict[str, float]:
    """Times and sizes of one latent with the three coders. Raises ValueError when one does not restore it."""
    float_1CHW, size = torch.from_numpy(integers_CHW).float()[None], integers_CHW.shape[1:]
    data, theirs, strings = codec.encode(integers_CHW, rate), same.encode(integers_CHW), factorized.compress(float_1CHW)
    read = (codec.decode(data, rate), same.decode(theirs), factorized.decompress(strings, size)[0].numpy())
    if not all(np.array_equal(integers_CHW, each_CHW) for each_CHW in read):
        raise ValueError(f"rate {rate}: a coder does not read what was written")
    return {
        "encode_ms": milliseconds(lambda: codec.encode(integers_CHW, rate)),
        "decode_ms": milliseconds(lambda: codec.decode(data, rate)),
        "same_tables_ms": milliseconds(lambda: same.decode(same.encode(integers_CHW))),
        "compressai_ms": milliseconds(lambda: factorized.decompress(factorized.compress(float_1CHW), size)),
        "bytes": len(data),
        "ideal_bytes": codec.ideal_bits(integers_CHW, rate) / 8,
        "same_tables_bytes": len(theirs),
        "compressai_bytes": len(strings[0]),
    }


def measure(codec: ContextualCodec, latents_NCHW: Sequence[Floats]) -> list[dict[str, Any]]:
    """For each rate the means over latents, and the speedup for each latent."""
    rows: list[dict[str, Any]] = []
    for rate in codec.rates:
        integers_NCHW = np.stack([codec.quantise(latent_CHW, rate) for latent_CHW in latents_NCHW])
        factorized, same = factorized_coder(integers_NCHW), SameTables(codec, rate)
        each = [compare(codec, rate, factorized, same, integers_CHW) for integers_CHW in integers_NCHW]
        row: dict[str, Any] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        ours_N = np.array([one["encode_ms"] + one["decode_ms"] for one in each])
        row |= {
            "rate": rate,
            "overhead_vs_ideal": row["bytes"] / row["ideal_bytes"] - 1,
            "bytes_vs_factorized": row["bytes"] / row["compressai_bytes"],
            "speedups": ([one["compressai_ms"] for one in each] / ours_N).tolist(),
            "speedups_same_tables": ([one["same_tables_ms"] for one in each] / ours_N).tolist(),
        }
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of all rates together."""
    return {
        "speedup_vs_compressai": float(np.median(np.concatenate([row["speedups"] for row in rows]))),
        "speedup_vs_compressai_same_tables": float(
            np.median(np.concatenate([row["speedups_same_tables"] for row in rows]))
        ),
        "overhead_vs_ideal": max(row["overhead_vs_ideal"] for row in rows),
        "bytes_vs_factorized": float(np.mean([row["bytes_vs_factorized"] for row in rows])),
    }


def latents(bundle: Bundle, tap: int, count: int) -> list[Floats]:
    """Latents of `count` calibration photos from a tap's encoder at full width."""
    head, found = Head(bundle, 1), []
    built = bundle.manifest.architecture.taps[tap]
    for path in load("calibration").paths[:count]:
        x_CHW = preprocess(open_image(path.read_bytes()), bundle.manifest.preprocessing)
        for index in range(built.after):
            x_CHW, _ = head.segment(index, x_CHW)
        found.append(head.encode(tap, x_CHW, len(built.widths) - 1))
    return found


@click.command(epilog="Example: python -m tests.bench.codec --photos 50 --json runs/codec.json")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "elpv", type=click.Path(path_type=Path))
@click.option("--photos", default=50, show_default=True, type=click.IntRange(1, 500))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path, photos: int, json_path: Path | None) -> None:
    """Compare the entropy coder with CompressAI's: every tap, rate by rate."""
    torch.set_num_threads(1)
    opened, rows = Bundle.open(bundle), []
    for tap, entry in enumerate(opened.manifest.taps):
        for row in measure(uncapped(opened, tap), latents(opened, tap, photos)):
            rows.append({"tap": entry.name, **row})
            click.echo(
                "{tap} {rate}: {bytes:.1f} B (ideal {ideal_bytes:.1f}, factorized {compressai_bytes:.1f}), "
                "{encode_ms:.3f} + {decode_ms:.3f} ms against {compressai_ms:.3f} ms".format(**rows[-1])
            )
    found = summary(rows)
    result = {
        "machine": f"{platform.machine()}, one thread",
        "photos": photos,
        **found,
        "rates": [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows],
    }
    click.echo(
        "{speedup_vs_compressai:.1f} times as fast ({speedup_vs_compressai_same_tables:.1f} with the same tables), "
        "{bytes_vs_factorized:.1%} of the bytes, {overhead_vs_ideal:.2%} above the ideal".format(**found)
    )
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
