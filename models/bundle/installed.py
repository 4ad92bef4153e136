"""Bundles by name: where they are looked for on this machine, and where `isthmus pull` puts them. Reads no bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.models import user_folders

NAME = "ISTHMUS_BUNDLES"  # in the environment: a folder of bundles, or an http(s) address of one
SHIPPED = Path(__file__).resolve().parent.parent / "zoo"  # every bundle of a checkout, a small one of a wheel


def user_folder() -> Path:
    """Where pulled bundles are kept: `isthmus/bundles` in XDG_DATA_HOME, by default ~/.local/share."""
    return user_folders.user_folder("data") / "bundles"


def folders() -> tuple[Path, ...]:
    """Folders of bundles in the order in which they are looked through."""
    named = os.environ.get(NAME, "")
    own = () if not named or "://" in named else (Path(named),)
    return (*own, user_folder(), SHIPPED)


def find(bundle: Path) -> Path:
    """A folder stays as it is; a bare name becomes the first folder of that name among `folders`, if there is one."""
    if len(bundle.parts) != 1 or bundle.is_dir() or bundle.name in ("", ".."):
        return bundle
    return next((folder / bundle for folder in folders() if (folder / bundle).is_dir()), bundle)


def find_all(bundles: Sequence[Path]) -> tuple[Path, ...]:
    """`find` for each."""
    return tuple(map(find, bundles))


def missing(bundle: Path) -> str | None:
    """Why there is no bundle of a bare name, in one line; None where `bundle` is a folder or a path."""
    if bundle.is_dir() or len(bundle.parts) != 1:
        return None
    places = ", ".join(str(folder) for folder in (Path("."), *folders()))
    return f"no bundle {str(bundle)!r} in {places}; `isthmus pull --help` says how to get one"
