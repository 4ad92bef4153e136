"""How a command ends when it cannot go on."""

from __future__ import annotations

import sys
from typing import NoReturn

import click


def fail(error: Exception | str) -> NoReturn:
    """End the program with one line and status 1."""
    click.echo(f"error: {error}", err=True)
    sys.exit(1)
