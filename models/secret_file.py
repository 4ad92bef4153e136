"""A key or token in one line: from a file, or from the environment. Never shown."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from isthmus.models.errors import InvalidInput

MAX_BYTES = 4096


def read_secret(path: Path | None, given: SecretStr | None, named: str, what: str) -> str:
    """The secret, or an empty text where there is none; the file counts before what is `given` as `named`.

    `what`: a word for it, with its article.

    Raises InvalidInput for what cannot be one line of ASCII, and for a file that holds none.
    """
    text = given.get_secret_value().strip() if given else ""
    if path is None and not text:
        return ""
    text = text if path is None else read_first(path)
    if not text or len(text) > MAX_BYTES or not text.isascii() or not text.isprintable():
        raise InvalidInput(f"{path or named}: expected one line with {what}")
    return text


def read_first(path: Path) -> str:
    """What a file holds, its first bytes if it is too long. Raises InvalidInput when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode(errors="replace").strip()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {(error.strerror or 'no reason given').lower()}") from error
