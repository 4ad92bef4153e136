"""Where a user's files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.models.user_folders import DEFAULTS, user_folder


@pytest.mark.parametrize("kind", DEFAULTS)
def test_folders_follow_the_environment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", "/elsewhere")
    assert user_folder(kind) == Path("/elsewhere/isthmus")  # type: ignore[arg-type]
    monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", "")
    assert user_folder(kind) == Path.home() / DEFAULTS[kind] / "isthmus"  # type: ignore[arg-type]
