"""The entropy coder beside CompressAI's, on the latents of real photos, under the same integer tables.

Prints and writes medians over photos of one run on one thread: `speedup_vs_compressai` (encode plus decode) and
`overhead_vs_ideal` (real bytes over the code length of the frozen tables, less one).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from models.bundle import Bundle
from models.codecs.factorized import FactorizedCodec, Integers
from models.recipes.compressai_entropy import EntropyBottleneck
from models.recipes.elpv_data import load
from models.vision.head import Head
from models.vision.images import open_image, preprocess
from tests.bench.processes import ROOT

REPEATS = 5


def compressai_coder(codec: FactorizedCodec, rate: int) -> EntropyBottleneck:
    """CompressAI's coder filled with our tables."""
    tables = codec.rates[rate]
    coder = EntropyBottleneck(len(tables.frequencies))
    longest = max(len(frequencies) for frequencies in tables.frequencies)
    cdf = np.zeros((len(tables.frequencies), longest + 1), np.int32)
    for row, frequencies in zip(cdf, tables.frequencies, strict=True):
        row[1 : len(frequencies) + 1] = np.cumsum(frequencies)
    coder._quantized_cdf = torch.from_numpy(cdf)
    coder._offset = torch.from_numpy(tables.first_C)
    coder._cdf_length = torch.tensor([len(f) + 1 for f in tables.frequencies], dtype=torch.int32)
    return coder


def seconds(call: Callable[[], Any]) -> float:
    """Median of a few runs."""
    times = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_s)
    return float(np.median(times))


def latents(bundle: Bundle, count: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """What the head makes of `count` calibration photos."""
    head, found = Head(bundle, 1), []
    for path in load("calibration").paths[:count]:
        x_CHW = preprocess(open_image(path.read_bytes()), bundle.manifest.preprocessing)
        for index in range(head.exits):
            x_CHW, _ = head.segment(index, x_CHW)
        found.append(head.encode(x_CHW))
    return found


def compare(codec: FactorizedCodec, theirs: EntropyBottleneck, integers_CHW: Integers, rate: int) -> dict[str, float]:
    """Times and sizes of one latent under both coders."""
    data = codec.encode(integers_CHW, rate)
    float_1CHW = torch.from_numpy(integers_CHW).float()[None]
    strings = theirs.compress(float_1CHW)
    ours_s = seconds(lambda: codec.encode(integers_CHW, rate)) + seconds(lambda: codec.decode(data, rate))
    size = integers_CHW.shape[1:]
    theirs_s = seconds(lambda: theirs.compress(float_1CHW)) + seconds(lambda: theirs.decompress(strings, size))
    return {
        "ours_ms": 1000 * ours_s,
        "compressai_ms": 1000 * theirs_s,
        "bytes": len(data),
        "compressai_bytes": len(strings[0]),
        "ideal_bytes": codec.ideal_bits(integers_CHW, rate) / 8,
    }


@click.command(epilog="Example: python -m tests.bench.codec --photos 50 --json runs/codec.json")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "elpv", type=click.Path(path_type=Path))
@click.option("--photos", default=50, show_default=True, type=click.IntRange(1, 500))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path, photos: int, json_path: Path | None) -> None:
    """Compare the entropy coder with CompressAI's, rate by rate."""
    torch.set_num_threads(1)
    opened = Bundle.open(bundle)
    codec, sources = opened.codec(), latents(opened, photos)
    rows = []
    for rate in range(len(codec.rates)):
        theirs = compressai_coder(codec, rate)
        each = [compare(codec, theirs, codec.quantise(latent_CHW, rate), rate) for latent_CHW in sources]
        rows.append({key: float(np.median([row[key] for row in each])) for key in each[0]})
        overhead = sum(row["bytes"] for row in each) / sum(row["ideal_bytes"] for row in each) - 1
        rows[-1] |= {"rate": rate, "overhead_vs_ideal": overhead}
        click.echo(
            "rate {rate}: {bytes:.0f} B (ideal {ideal_bytes:.0f}, CompressAI {compressai_bytes:.0f}), "
            "{ours_ms:.2f} ms against {compressai_ms:.2f} ms".format(**rows[-1])
        )
    result = {
        "machine": f"{platform.machine()}, one thread",
        "photos": photos,
        "speedup_vs_compressai": float(np.median([row["compressai_ms"] / row["ours_ms"] for row in rows])),
        "overhead_vs_ideal": max(row["overhead_vs_ideal"] for row in rows),
        "rates": rows,
    }
    click.echo(f"speedup {result['speedup_vs_compressai']:.1f}x, overhead {result['overhead_vs_ideal']:.2%}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
