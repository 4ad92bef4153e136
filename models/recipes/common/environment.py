"""Where a run takes place, as the manifests of bundles record it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The machine, and the versions of some packages."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
    }
