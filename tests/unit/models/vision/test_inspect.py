from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy

from isthmus.models.bundle.files import write_bundle
from isthmus.models.errors import BundleError
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.inspect import exits_note, summary, verify
from isthmus.models.vision.manifest import Head, Manifest
from tests.conftest import Parts, paper_tables
from tests.tiny_bundle import certificate, depends_on


def shown_of(folder: Path) -> str:
    return "\n".join(summary(verify(folder)))


def test_inspect_shows_what_a_person_asks_for(paper: Parts, tmp_path: Path) -> None:
    shown = shown_of(paper.write(tmp_path / "b"))
    for words in ("Apache-2.0", "8x8 RGB", "exit0", "loss of accuracy <= 1.0% with confidence 90%", "0.7500 [0.5000"):
        assert words in shown
    assert "task defect: good, bäd" in shown
    assert "tap deep: after segment 0, latent 2x4x4, at most 64 B" in shown


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (
            400,
            "loss of accuracy <= 0.5% with confidence 90% takes 460 calibration images without a loss, there are 400",
        ),
        (460, "takes fewer losses than the most confident of 460 calibration images have"),
    ],
)
def test_an_exit_that_never_answers_is_said_to(paper: Parts, tmp_path: Path, samples: int, words: str) -> None:
    never = {**certificate(0.005, (2.0,)), "shares": [0.0], "samples": samples}
    for head in paper.manifest["heads"].values():
        head["thresholds"] = [never]
    manifest = verify(paper.write(tmp_path / "b"))
    shown = "\n".join(summary(manifest))
    assert "exit never: " in shown and words in shown and "2.000" not in shown
    assert exits_note(manifest.heads["fp32"], 0.005).endswith(f"{words[words.index('takes') :]}; nor at any other")


def test_the_epsilon_from_which_exits_answer_is_named() -> None:
    def head(*confidences: float) -> Head:
        each = zip((0.005, 0.006, 0.01), confidences, strict=True)
        return Head.model_validate(
            {
                "files": ["a"],
                "exits": [{"name": "exit0", "accuracy": 1.0, "agreement": 1.0}],
                "thresholds": [{**certificate(epsilon, (sure,)), "samples": 400} for epsilon, sure in each],
                "depends_on": depends_on("fp32"),
            }
        )

    assert exits_note(head(0.9, 0.8, 0.7), 0.005) == ""
    assert exits_note(head(2, 2, 0.7), 0.005).endswith("there are 400; they do from --epsilon 0.01 on")


def test_inspect_has_a_row_for_each_width_and_rate(tiny_bundle: Bundle) -> None:
    shown = shown_of(tiny_bundle.folder)
    assert "tiny: defect, colour" in shown and "task colour: red, green, blue" in shown
    light, deep = shown[shown.index("tap light: of the image") :].split("tap deep: after segment 1")
    rows = [line.split() for line in light.splitlines() if line.startswith("    ")]
    assert rows[0] == ["width", "encoder", "MMAC", "rate", "mean", "B", "max", "B", "accuracy", "agreement"]
    assert [row[:3] for row in rows[1:]] == [[w, m, r] for w, m in (("0.5", "4.0"), ("1", "8.0")) for r in "012"]
    assert rows[1][3:] == ["40", "200", "0.800", "0.940"]
    assert [line.split()[2] for line in deep.splitlines() if line.startswith("     ")] == ["0", "1"]


def test_inspect_shows_each_certificate_and_what_it_depends_on(paper: Parts, tmp_path: Path) -> None:
    head = paper.manifest["heads"]["fp32"]
    head["exits"][0]["score"] = {"bias": 0.5, "weights": [1, 0, 0, 0, 0]}
    exited = {**certificate(0.02, (0.8,)), "promise": "agreement", "among": "exited", "loss": 0.0123}
    head["thresholds"].append(exited)
    shown = shown_of(paper.write(tmp_path / "b"))
    for words in (
        "certificates hold for graphs 000000000000, cloud 111111111111, preprocessing 222222222222, fp32, onnx",
        "exit from  0.900: loss of accuracy <= 1.0% with confidence 90% (n=300, observed 0.00%, coverage 50.0%)",
    ):
        assert words in shown
    assert "exit from  0.800: other answers than the cloud's <= 2.0% of what exits answer" in shown
    assert "observed 1.23%" in shown and "judged by its correctness head" in shown


def test_inspect_shows_whole_images_with_intervals(paper: Parts, tmp_path: Path) -> None:
    shown = shown_of(paper.write(tmp_path / "b"))
    assert "jpeg       75      90  0.750 [0.698, 0.796]  0.500 [0.444, 0.556]" in shown
    assert "of 300 calibration images" in shown


def test_inspect_does_not_print_a_hundred_thousand_labels(paper: Parts, tmp_path: Path) -> None:
    paper.manifest["tasks"] = [{"name": "plants", "labels": [f"plant{number}" for number in range(12)]}]
    paper.manifest["architecture"]["classes"] = [12]
    shown = shown_of(paper.write(tmp_path / "b"))
    assert "plant9 and 2 more" in shown and "plant10" not in shown


def test_verify_looks_into_the_tables(paper: Parts, tmp_path: Path) -> None:
    tensors = paper_tables()
    tensors["frequencies"][0] += 1
    paper.replace(tmp_path / "b", "tables.safetensors", safetensors.numpy.save(tensors))
    with pytest.raises(BundleError, match="add up to"):
        verify(tmp_path / "b")


def test_verify_looks_into_the_tables_of_every_tap(tiny_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: tiny_bundle.read(name) for name in tiny_bundle.manifest.files}
    files["deep.safetensors"] = files["light.safetensors"]
    content = tiny_bundle.manifest.model_dump(mode="json", exclude={"files", "fingerprint", "schema_version"})
    folder = write_bundle(tmp_path / "b", content, files, Manifest)
    with pytest.raises(BundleError, match="rates, expected 2"):
        verify(folder)


def test_verify_looks_into_the_weights(paper: Parts, tmp_path: Path) -> None:
    folder = paper.replace(tmp_path / "b", "weights.safetensors", b"?")
    with pytest.raises(BundleError, match="not a safetensors file"):
        verify(folder)
