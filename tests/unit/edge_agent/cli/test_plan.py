from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.edge_agent.cli.main import main
from isthmus.models.vision.bundle import Bundle


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ("plan", *arguments))


@pytest.fixture
def profile(tiny_bundle: Bundle, tmp_path: Path) -> str:
    """The speeds of this machine, kept."""
    file = tmp_path / "here.json"
    found = invoke("--bundle", str(tiny_bundle.folder), "--link", "1/20", "--save", str(file), "--threads", "1")
    assert found.exit_code == 0, found.output
    return str(file)


def test_a_grid_of_links_in_a_table(tiny_bundle: Bundle, profile: str) -> None:
    found = invoke("--bundle", str(tiny_bundle.folder), "--device", profile)
    assert found.exit_code == 0, found.output
    title, header, *rows = found.output.splitlines()
    assert "tiny at fp32: expected of a photo" in title and header.split()[:2] == ["Mbit/s", "rtt"]
    assert len(rows) == 25 and [row.split()[0] for row in rows[::5]] == ["0.25", "1", "5", "25", "100"]


def test_json_names_ways_bytes_latency_and_agreement(tiny_bundle: Bundle, profile: str) -> None:
    arguments = ("--bundle", str(tiny_bundle.folder), "--device", profile, "--link", "2/40", "--cloud-ms", "30")
    (row,) = json.loads(invoke(*arguments, "--json").output)
    (link,) = row["links"]
    assert (link["mbit"], link["rtt_ms"], row["precision"], row["fits_best"]) == (2, 40, "fp32", True)
    assert {"way", "ways", "seconds", "up_bytes", "usd", "agreement", "why"} <= link.keys()


def test_several_devices_bundles_and_precisions_are_compared(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder, file = str(tiny_bundle.folder), tmp_path / "all.json"
    assert invoke(folder, "--link", "1/20", "--save", str(file)).exit_code == 0
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps({**json.loads(file.read_text()), "device": "slow"}), encoding="utf-8")
    found = invoke(folder, "--device", str(file), "--device", str(slow), "--link", "1/20", "--json")
    rows = json.loads(found.output)
    precisions = list(tiny_bundle.manifest.heads)
    assert [row["precision"] for row in rows] == precisions * 2
    assert [row["device"] for row in rows].count("slow") == len(precisions)
    assert sum(row["fits_best"] for row in rows) == 2
    assert "fits best" in invoke(folder, "--device", str(file), "--link", "1/20").output or len(precisions) == 1


def test_the_map_is_drawn(tiny_bundle: Bundle, profile: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    found = invoke("--bundle", str(tiny_bundle.folder), "--device", profile, "--link", "1/20", "--plot", str(picture))
    assert found.exit_code == 0, found.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(
    tiny_bundle: Bundle, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = invoke("--bundle", str(tiny_bundle.folder), "--device", profile, "--plot", str(tmp_path / "map.png"))
    assert (found.exit_code, found.stderr) == (
        1,
        "error: --plot needs the package matplotlib: pip install matplotlib\n",
    )


@pytest.mark.parametrize("link", ["2", "2/", "-1/5", "0/5", "2/40ms", "nan/1"])
def test_what_is_no_link_is_refused(tiny_bundle: Bundle, link: str) -> None:
    found = invoke("--bundle", str(tiny_bundle.folder), "--link", link)
    assert found.exit_code == 2 and "expected Mbit/s and ms of round trip, such as 2/40" in found.stderr


def test_what_contradicts_itself_or_is_missing_is_one_line(tiny_bundle: Bundle, profile: str, tmp_path: Path) -> None:
    both = invoke("--bundle", str(tiny_bundle.folder), "--device", profile, "--save", str(tmp_path / "x"))
    assert both.exit_code == 2 and "--device measures nothing" in both.stderr
    nowhere = invoke("no-such-bundle")
    assert nowhere.exit_code == 1 and nowhere.stderr.startswith("error: no bundle 'no-such-bundle' in")
