"""How a command of either program ends when it cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click


def fail(error: Exception | str) -> NoReturn:
    """End the program with one line and status 1."""
    click.echo(f"error: {error}", err=True)
    sys.exit(1)


@contextmanager
def needing(extras: str) -> Iterator[None]:
    """Imports that only these extras bring: what is missing ends the program with the way to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        fail(f"the package {package} is missing: pip install 'isthmus[{extras}]'")
