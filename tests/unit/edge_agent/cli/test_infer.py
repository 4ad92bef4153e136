from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from isthmus.edge_agent.cli.main import main
from isthmus.models.vision.bundle import Bundle


@pytest.fixture
def photos(tmp_path: Path, photo: Image.Image) -> tuple[str, str, str]:
    """Good, unreadable, good."""
    first, second, third = (tmp_path / name for name in ("a.png", "b.png", "c.jpg"))
    photo.save(first)
    second.write_bytes(b"no photo")
    photo.save(third)
    return str(first), str(second), str(third)


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


def test_one_unreadable_file_fails_alone(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", *photos, "--bundle", str(tiny_bundle.folder), "--json")
    assert result.exit_code == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == [photos[0], photos[2]]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {photos[1]}: not a readable")


def test_a_person_reads_label_place_time_and_reason(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), "--mode", "edge")
    assert result.exit_code == 0
    assert "on the device at exit1" in result.stdout
    assert "why: mode edge" in result.stdout
    assert " ms" in result.stdout


def test_settings_come_from_the_environment(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    folder = str(tiny_bundle.folder)
    result = invoke("infer", photos[0], "--json", ISTHMUS_EDGE_BUNDLE=folder, ISTHMUS_EDGE_MODE="edge")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["why"] == "mode edge"


def test_pins_and_tasks_reach_the_agent(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    pins = ("--tap", "light", "--width", "0.5", "--rate", "2", "--task", "colour", "--task", "defect")
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), "--json", *pins)
    assert result.exit_code == 0
    row = json.loads(result.stdout)
    assert row["why"].startswith("tap light, width 0.5, rate 2 requested; no cloud is configured")
    assert (row["missing"], list(row["answers"])) == (["colour"], ["defect"])
    read = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), *pins).stdout
    assert "colour MISSING" in read and "DEGRADED" not in read


def test_tasks_come_from_the_environment_too(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    folder = str(tiny_bundle.folder)
    result = invoke("infer", photos[0], "--json", ISTHMUS_EDGE_BUNDLE=folder, ISTHMUS_EDGE_TASK="defect colour")
    assert json.loads(result.stdout)["missing"] == ["colour"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "size"), "task 'size' does not exist, there are defect, colour"),
        (("--tap", "medium"), "tap 'medium' does not exist, there are light, deep"),
        (("--tap", "deep", "--width", "0.5"), "width 0.5 does not exist at tap deep, there are 1"),
        (("--rate", "7"), "rate 7 does not exist, there are 0 to 2"),
        (("--width", "7"), "--width"),
        (("--rate", "-1"), "--rate"),
    ],
)
def test_what_the_bundle_does_not_have_is_said_in_one_line(
    tiny_bundle: Bundle, photos: tuple[str, str, str], arguments: tuple[str, ...], words: str
) -> None:
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), *arguments)
    assert result.exit_code != 0 and result.stdout == ""
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_default_bundle_knows_a_cat(photo_of_a_cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISTHMUS_EDGE_BUNDLE", "ISTHMUS_BUNDLES"):
        monkeypatch.delenv(name, raising=False)
    result = invoke("infer", str(photo_of_a_cat), "--json", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["label"] in ("tabby", "Egyptian cat", "tiger cat")


@pytest.fixture
def photo_of_a_cat() -> Path:
    return Path(__file__).parents[4] / "docs/samples/photo.jpg"


def test_a_bundle_that_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    result = invoke("infer", "x.png", "--bundle", "moon")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no bundle 'moon' in ") and "isthmus pull" in line
