"""Lines of JSON that a killed run has left."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.models.recipes.common.json_lines import read_lines


def test_half_a_line_is_left_out_and_a_missing_file_has_none(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": 1}\n{"b": [2]}\n{"c": {"d"')
    assert read_lines(file) == [{"a": 1}, {"b": [2]}]


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("{a}\n")
    with pytest.raises(ValueError, match="Expecting"):
        read_lines(tmp_path / "log.jsonl")
