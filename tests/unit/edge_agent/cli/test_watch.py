"""`edge-agent watch`: what it refuses, and a calibration that a later run uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from isthmus.edge_agent.cli.main import main
from isthmus.models.vision.bundle import Bundle
from tests.tiny_clip import scenes, write_clip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["watch", *map(str, arguments)])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "front.mp4", scenes(20, 20))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "SOURCE"),
        (("nowhere.mp4",), 1, "'nowhere.mp4' does not exist, expected a folder, a file, rtsp://"),
        (("rtsp://host/x", "--resume"), 2, "--results, which is missing"),
        (("rtsp://host/x", "--webhook", "ftp://host/s3cret"), 2, "expected http://… or https://…"),
        (("rtsp://host/x", "rtsp://host/y"), 1, "two sources are named host"),
        (("rtsp://host/x", "--when-full", "panic"), 2, "drop_oldest"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: tuple[str, ...], status: int, said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == status and said in done.output
    assert "Traceback" not in done.output and "s3cret" not in done.output


def test_a_calibration_is_used_by_the_next_run(tiny_bundle: Bundle, clip: Path, tmp_path: Path) -> None:
    settings = ("--bundle", tiny_bundle.folder, "--threads", 1, "--reuse-ms", 450, "--reuse-epsilon", 0.3)
    uncalibrated = run(clip, *settings, "--results", tmp_path / "none.jsonl")
    assert "front: no answer is reused at --reuse-epsilon 0.3: it is not calibrated" in uncalibrated.output
    found = json.loads(run("--calibrate", clip, *settings, "--json").output)
    assert found["camera"] == "front" and found["chosen"]["blocks"] == 9 and found["chosen"]["differing"] == 0
    done = run(clip, *settings, "--results", tmp_path / "some.jsonl")
    assert done.exit_code == 0 and "front: 40 frames: 8 answered, 32 reused" in done.output
    strict = run(clip, *settings[:-1], 0.01, "--results", tmp_path / "strict.jsonl")
    assert "no answer is reused at --reuse-epsilon 0.01: least certified is 0.226" in strict.output
