"""Data from Debian packages, unpacked without installing them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from isthmus.models.errors import InvalidInput


def fetch(package: str, folder: Path) -> Path:
    """The folder with a package's contents, below `folder`; downloads it unless it exists.

    Raises InvalidInput when it cannot be downloaded: no Debian, no network.
    """
    target, scratch = folder / package, folder / f".{package}"
    if target.exists():
        return target
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        run(["apt-get", "download", package], scratch)
        (archive,) = scratch.glob("*.deb")
        run(["dpkg-deb", "-x", archive.name, "."], scratch)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise InvalidInput(f"the Debian package {package} cannot be fetched into {folder}: {error}") from error
    archive.unlink()
    scratch.rename(target)
    return target


def run(command: Sequence[str], folder: Path) -> None:
    """Raises CalledProcessError when it fails."""
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
