"""One line of JSON a frame, in a file or on standard output. Each line is written at once: a kill cuts none."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from isthmus.models.errors import InvalidInput

MAX_LINE = 1 << 20  # bytes


class Lines:
    """Lines are added to the file; what a kill left of a last one is removed first. Raises InvalidInput."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            sys.stdout.flush()
            self._file = sys.stdout.fileno() if path is None else opened(path)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, line: dict[str, Any]) -> None:
        """Raises InvalidInput if it cannot be written."""
        data = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self._path is not None:
            os.close(self._file)

    def _unwritable(self, error: OSError) -> InvalidInput:
        return InvalidInput(f"the results cannot be written to {self._path or 'standard output'}: {error.strerror}")


def opened(path: Path) -> int:
    """A descriptor that adds to the file, which ends with a whole line. Raises OSError, InvalidInput."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    if not stat.S_ISREG((status := os.fstat(file)).st_mode):
        return file
    start = max(0, status.st_size - MAX_LINE)
    end = os.pread(file, MAX_LINE, start)
    if cut := end[end.rfind(b"\n") + 1 :]:
        if not cut.startswith(b'{"') or len(cut) == MAX_LINE:
            os.close(file)
            raise InvalidInput(f"{path} does not end with a line of results, to which others could be added")
        os.ftruncate(file, status.st_size - len(cut))
    return file


def last_frames(path: Path) -> dict[str, int]:
    """The last frame of each camera in a file of results; none without the file. Raises InvalidInput."""
    found: dict[str, int] = {}
    if not path.exists():
        return found
    with path.open("rb") as content:
        for number, data in enumerate(content, 1):
            if not data.endswith(b"\n"):
                break
            try:
                line = json.loads(data)
                if "frame" in line:
                    found[str(line["camera"])] = max(found.get(str(line["camera"]), -1), int(line["frame"]))
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidInput(f"{path}:{number} is no line of results") from error
    return found
