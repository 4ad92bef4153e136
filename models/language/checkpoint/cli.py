"""Command line of `python -m isthmus.models.language.checkpoint`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing

with needing("llm"):
    from isthmus.models.language.checkpoint import export as exporting
    from isthmus.models.language.checkpoint.checkpoint import Checkpoint

EXAMPLES = """\b
Examples:
  python -m isthmus.models.language.checkpoint export smollm2 build/smollm2
  python -m isthmus.models.language.checkpoint export model.gguf build/model --dtype bfloat16"""


@click.group(epilog=EXAMPLES)
def main() -> None:
    """Language models on disk."""


@main.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(get_args(exporting.DType)),
    default="float32",
    show_default=True,
    help="Type of the weights. float32 is exact; the others round to the nearest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(model: str, folder: Path, dtype: exporting.DType, as_json: bool) -> None:
    """Write MODEL as a Hugging Face folder, which vLLM, SGLang and transformers open.

    MODEL is a GGUF file, a Hugging Face folder, or smollm2. FOLDER must not exist. Quantised weights are written as the
    numbers that they stand for.
    """
    try:
        checkpoint = Checkpoint.open(model)
        size = exporting.weights_size(checkpoint.config, dtype)
        hidden = not sys.stderr.isatty()
        with click.progressbar(length=size, label=checkpoint.name, file=sys.stderr, hidden=hidden) as bar:
            result = exporting.export(checkpoint, folder, dtype, bar.update)
    except IsthmusError as error:
        fail(error)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(f"{result.folder}: {result.name}, {result.tensors} tensors of {dtype}, {result.bytes / 1e6:.1f} MB")
