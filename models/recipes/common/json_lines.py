"""Files to which a run adds lines of JSON as it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[Any]:
    """The values of a file's lines; none without the file. Of a killed run the last half line is left out.

    Raises ValueError for lines that are not JSON.
    """
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
