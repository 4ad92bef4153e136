"""Folders of one user's files, by the XDG base directory specification. They need not exist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

DEFAULTS = {"cache": ".cache", "data": ".local/share", "state": ".local/state"}  # below the home folder


def user_folder(kind: Literal["cache", "data", "state"]) -> Path:
    """`isthmus` in XDG_CACHE_HOME, XDG_DATA_HOME or XDG_STATE_HOME, or where these are by default."""
    home = os.environ.get(f"XDG_{kind.upper()}_HOME")
    return (Path(home) if home else Path.home() / DEFAULTS[kind]) / "isthmus"
