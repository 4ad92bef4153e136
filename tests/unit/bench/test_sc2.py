"""The whole benchmark in this process: a tiny bundle, a few real photos, trained runs that are fakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from isthmus.models.recipes.vision.elpv_data import Photos, load
from isthmus.models.vision.bundle import Bundle
from tests.bench import sc2, sc2_photos
from tests.unit.bench.fakes import FakeBaseline, FakeBaselines


@pytest.fixture(scope="module")
def photos() -> Photos:
    return load("test")


@pytest.fixture
def run(tiny_bundle: Bundle, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sc2_photos, "load", lambda part: {"test": photos}[part])

    def invoke(*arguments: str) -> Result:
        places = ["--bundle", str(tiny_bundle.folder), "--work", str(tmp_path / "work"), "--resamples", "100"]
        return CliRunner().invoke(sc2.main, [*places, "--photos", "4", *arguments])

    return invoke


def test_every_method_beside_every_other(run: Any, baselines: FakeBaselines, tmp_path: Path) -> None:
    baselines.ready = [
        FakeBaseline(method, f"price {price}", length=20 * price)
        for method in ("entropic-student", "n0")
        for price in (1, 2)
    ]
    figures, picture = tmp_path / "new" / "sc2.json", tmp_path / "new" / "sc2.png"
    found = run("--methods", "jpeg,ours,n0,entropic-student", "--json", str(figures), "--plot", str(picture))
    assert found.exit_code == 0, found.output
    assert "| entropic-student | 2.0 | 5.0 |" in found.output
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert result["n"] == 4 and result["reference"] == "entropic-student"
    assert list(result["methods"]) == ["jpeg", "entropic-student", "n0", "ours light 0.5", "ours", "ours deep"]
    assert [point["setting"] for point in result["methods"]["n0"]["points"]] == ["price 1", "price 2"]
    assert picture.stat().st_size > 10_000
    against = result["methods"]["ours"]["against"]
    assert list(against) == ["n0"] and set(against["n0"]) == {"accuracy", "agreement"}
    assert "\nours against n0: accuracy " in found.output and "n0 against" not in found.output


def test_started_again_it_goes_on(run: Any, baselines: FakeBaselines) -> None:
    baselines.ready = [FakeBaseline()]
    assert run("--methods", "n0").exit_code == 0
    encoded = baselines.ready[0].encoded
    assert run("--methods", "n0").exit_code == 0
    assert baselines.ready[0].encoded == encoded + 1


def test_missing_training_is_one_line(run: Any, baselines: FakeBaselines) -> None:
    found = run("--methods", "ours,n4")
    assert found.exit_code == 1 and found.stdout == ""
    assert found.stderr.startswith("error: no finished runs of n4") and found.stderr.count("\n") == 1


def test_what_is_not_trained_is_left_out_and_named(
    run: Any, baselines: FakeBaselines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.sc2_ways.CODECS", ("jpeg",))
    baselines.ready = [FakeBaseline("n0"), FakeBaseline("entropic-student")]
    found = run("--json", str(tmp_path / "sc2.json"))
    assert found.exit_code == 0 and "baselines bq n4 ours-single --work" in found.stderr
    result = json.loads((tmp_path / "sc2.json").read_text(encoding="utf-8"))
    assert result["left_out"] == ["bq", "n4", "ours-single"] and "n0" in result["methods"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "ours,guess"), "guess unknown, choose among jpeg, webp"),
        (("--methods", " , "), "choose among"),
        (("--photos", "1"), "--photos"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Any, arguments: tuple[str, ...], words: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2 and words in found.stderr


def test_a_missing_bundle_is_one_line(run: Any, tmp_path: Path) -> None:
    found = run("--bundle", str(tmp_path / "nowhere"))
    assert found.exit_code == 1 and found.stderr == f"error: {tmp_path / 'nowhere'}: no such bundle folder\n"
