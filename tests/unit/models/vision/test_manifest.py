from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from isthmus.models.errors import BundleError
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.tasks import Task
from tests.conftest import Parts

Content = dict[str, Any]


def put(*path_and_value: Any) -> Callable[[Content], None]:
    """A change that puts the last argument where the others lead."""
    *path, last, value = path_and_value

    def change(content: Content) -> None:
        for step in path:
            content = content[step]
        content[last] = value

    return change


def list_file(new: str) -> Callable[[Content], None]:
    """One more file, listed under a name that leads elsewhere."""

    def change(content: Content) -> None:
        content["files"][new] = content["files"]["head0.onnx"]

    return change


TAP = ("architecture", "taps", 0)
EXIT = ("heads", "fp32", "exits", 0)
CERTIFICATE = ("heads", "fp32", "thresholds", 0)
DEPENDS = ("heads", "fp32", "depends_on")


def tap(content: Content, **fields: Any) -> Content:
    return {**content["taps"][0], **fields}


def int8_of(content: Content) -> Content:
    """The head at fp32 as one at int8."""
    head = content["heads"]["fp32"]
    return {**head, "depends_on": {**head["depends_on"], "precision": "int8"}}


WRONG = {
    "version before": (put("schema_version", 3), "schema_version 3, this program reads 4"),
    "unknown version": (put("schema_version", 5), "schema_version 5, this program reads 4"),
    "version as text": (put("schema_version", "4"), "schema_version"),
    "no version": (lambda content: content.pop("schema_version"), "schema_version None"),
    "unknown field": (put("surprise", 1), "surprise"),
    "missing field": (lambda content: content.pop("licence"), "licence"),
    "no task": (put("tasks", []), "tasks"),
    "nine tasks": (lambda content: put("tasks", content["tasks"] * 9)(content), "tasks"),
    "a task without a name": (put("tasks", 0, "name", ""), "tasks.0.name"),
    "absolute path": (list_file("/etc/passwd"), "files"),
    "parent path": (list_file("../head0.onnx"), "files"),
    "two dots": (list_file(".."), "files"),
    "backslash path": (list_file("a\\head0.onnx"), "files"),
    "sub-folder": (list_file("sub/head0.onnx"), "files"),
    "line break in a name": (list_file("head0.onnx\n"), "files"),
    "path in a head alone": (put("heads", "fp32", "files", ["../x"]), "heads.fp32.files.0"),
    "file that is not listed": (put("weights", "other.safetensors"), "files does not list other.safetensors"),
    "size below zero": (put("files", "head0.onnx", "size", -1), "files.head0.onnx.size"),
    "size of a terabyte": (put("files", "head0.onnx", "size", 1 << 40), "files.head0.onnx.size"),
    "hash that is none": (put("files", "head0.onnx", "sha256", "x" * 64), "files.head0.onnx.sha256"),
    "one label": (put("tasks", 0, "labels", ["good"]), "tasks.0.labels"),
    "a label more than classes": (put("tasks", 0, "labels", ["a", "b", "c"]), "architecture.classes is (2,)"),
    "class more than labels": (put("architecture", "classes", [3]), "architecture.classes is (3,)"),
    "classes of a task that is not there": (put("architecture", "classes", [2, 2]), "architecture.classes is (2, 2)"),
    "a class of one task": (put("architecture", "classes", [1]), "architecture.classes is (1,)"),
    "shape with no channels": (put("segments", 0, "output", [0, 4, 4]), "segments.0.output"),
    "shape of two numbers": (put("segments", 0, "output", [4, 4]), "segments.0.output"),
    "input that the crop does not give": (put("segments", 0, "input", [3, 9, 8]), "the crop gives (3, 8, 8)"),
    "crop larger than the photo": (put("preprocessing", "crop", [9, 8]), "preprocessing"),
    "deviation of zero": (put("preprocessing", "deviation", [0.5, 0, 0.5]), "preprocessing.deviation.1"),
    "mean that is no number": (put("preprocessing", "mean", [0.5, float("nan"), 0.5]), "preprocessing.mean.1"),
    "infinite seconds": (put("training", "seconds", float("inf")), "training.seconds"),
    "latent of other channels": (put("taps", 0, "latent", [3, 4, 4]), "tap deep: architecture has 2 latent channels"),
    "another number of rates": (put(*TAP, "rates", 2), "tap deep: architecture has 2 rates"),
    "65 rates": (put(*TAP, "rates", 65), "architecture.taps.0.rates"),
    "no tap": (put("taps", []), "taps"),
    "a tap more than built": (lambda content: content["taps"].append(tap(content, name="light")), "of one length"),
    "a tap of a name that is taken": (lambda content: content["taps"].append(tap(content)), "different names"),
    "a tap after more segments than there are": (put(*TAP, "after", 2), "comes after 2 segments, there are 1"),
    "a tap on the image without blocks": (put(*TAP, "after", 0), "blocks must be above 0"),
    "blocks of a tap on features": (put(*TAP, "blocks", 2), "blocks must be above 0"),
    "widths of a tap on features": (put(*TAP, "widths", [0.5, 1.0]), "only a tap on the image has several widths"),
    "exits for other cuts": (put("architecture", "exit_blocks", [[2], [3]]), "exit_blocks has 2 exits for 1 cuts"),
    "an exit before its cut": (put("architecture", "exit_blocks", [[1, 3]]), "must rise, from the cut at 2 on"),
    "an exit back and forth": (put("architecture", "exit_blocks", [[3, 2]]), "must rise, from the cut at 2 on"),
    "an exit of nothing": (put("architecture", "exit_blocks", [[]]), "architecture.exit_blocks.0"),
    "a tap that rejoins after the cut": (put(*TAP, "rejoin", 3), "rejoins at block 3, the tail starts at 2"),
    "widths that fall": (put(*TAP, "widths", [1.0, 0.5]), "must rise"),
    "widths that end below one": (put(*TAP, "widths", [0.5]), "end with 1"),
    "a width of nothing": (put(*TAP, "widths", [0.0, 1.0]), "architecture.taps.0.widths.0"),
    "another width": (put("taps", 0, "widths", 0, "width", 0.5), "tap deep: architecture has widths (1.0,)"),
    "tables that are not listed": (put("taps", 0, "tables", "other"), "files does not list other"),
    "another number of cuts": (put("architecture", "cuts", [2, 5]), "one length"),
    "cuts that fall": (put("architecture", "cuts", [5, 2]), "cuts (5, 2) must rise"),
    "a cut twice": (put("architecture", "cuts", [2, 2]), "cuts (2, 2) must rise"),
    "no exit": (put("heads", "fp32", "exits", []), "heads.fp32.exits"),
    "cap without a bound": (put("taps", 0, "max_payload_bytes", 1 << 30), "taps.0.max_payload_bytes"),
    "accuracy above one": (put("heads", "fp32", "exits", 0, "accuracy", 1.5), "heads.fp32.exits.0.accuracy"),
    "no whole image": (put("images", []), "images"),
    "a whole image twice": (lambda content: put("images", content["images"] * 2)(content), "images must differ"),
    "17 whole images": (
        lambda content: put("images", [{**content["images"][0], "quality": q} for q in range(1, 18)])(content),
        "images",
    ),
    "a form that no device writes": (put("images", 0, "form", "avif"), "images.0.form"),
    "a quality of nothing": (put("images", 0, "quality", 0), "images.0.quality"),
    "an image of fewer than no bytes": (put("images", 0, "mean_bytes", -1), "images.0.mean_bytes"),
    "figures of no samples": (put("calibration_samples", 0), "calibration_samples"),
    "a threshold for no exit": (put(*CERTIFICATE, "confidences", [0.9, 0.9]), "a confidence and a share for each exit"),
    "a share of no exit": (put(*CERTIFICATE, "shares", [0.1, 0.1]), "a confidence and a share for each exit"),
    "a confidence that is no number": (put(*CERTIFICATE, "confidences", [float("nan")]), "confidences.0"),
    "a promise of nothing": (put(*CERTIFICATE, "promise", "everything"), "thresholds.0.promise"),
    "an average over nobody": (put(*CERTIFICATE, "among", "none"), "thresholds.0.among"),
    "257 certificates": (
        lambda content: content["heads"]["fp32"].update(thresholds=content["heads"]["fp32"]["thresholds"] * 257),
        "heads.fp32.thresholds",
    ),
    "certificates that depend on nothing": (
        lambda content: content["heads"]["fp32"].pop("depends_on"),
        "heads.fp32.depends_on",
    ),
    "certificates of another precision": (put(*DEPENDS, "precision", "int8"), "certificates of fp32 depend on int8"),
    "a runtime of many lines": (put(*DEPENDS, "runtime", "onnxruntime 1.31\nand more"), "depends_on.runtime"),
    "a correctness head of one weight": (put(*EXIT, "score", {"bias": 0, "weights": [1]}), "exits.0.score.weights"),
    "a correctness head without a bound": (
        put(*EXIT, "score", {"bias": float("inf"), "weights": [0] * 5}),
        "exits.0.score.bias",
    ),
    "text as number": (put("tail_macs", "many"), "tail_macs"),
    "a precision that does not exist": (put("heads", "int4", {}), "heads.int4"),
    "no fp32 head": (lambda content: content.update(heads={"int8": content["heads"]["fp32"]}), "heads must have fp32"),
    "a file for no segment": (
        lambda content: content["heads"]["fp32"]["files"].append("encoder.onnx"),
        "files and exits of fp32 must be of one length",
    ),
    "other exits at int8": (
        lambda content: content["heads"].update(
            int8={**int8_of(content), "exits": [{"name": "late", "accuracy": 0.5, "agreement": 0.5}]}
        ),
        "exits of int8 must be named like those of fp32",
    ),
    "an int8 file that is not listed": (
        lambda content: content["heads"].update(int8={**int8_of(content), "files": ["head0.int8.onnx"]}),
        "files does not list head0.int8.onnx",
    ),
    "101 files": (
        lambda content: content["files"].update({f"f{i}": content["files"]["head0.onnx"] for i in range(97)}),
        "101 files, at most 100",
    ),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_manifest_that_cannot_be_true_is_refused_by_name(
    paper: Parts, tmp_path: Path, change: Callable[[Content], Any], words: str
) -> None:
    folder = paper.tamper(tmp_path / "b", change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert "manifest.json" in str(caught.value)
    assert words in str(caught.value)


def test_segments_must_fit_each_other(paper: Parts, tmp_path: Path) -> None:
    def change(content: Content) -> None:
        content["segments"].append({**content["segments"][0], "input": [17, 4, 4]})
        head = content["heads"]["fp32"]
        head["exits"] *= 2
        head["files"] *= 2
        head["thresholds"] = []
        content["architecture"]["cuts"] = [2, 5]

    folder = paper.tamper(tmp_path / "b", change)
    with pytest.raises(BundleError, match="segment 0 gives .* segment 1 takes"):
        Bundle.open(folder)


def test_a_manifest_cannot_be_changed_once_read(paper: Parts, tmp_path: Path) -> None:
    manifest = Bundle.open(paper.write(tmp_path / "b")).manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"


DETECT = {
    "kind": "detect", "name": "things", "labels": ["dog"], "max_boxes": 100, "min_score": 0.3, "nms_iou": 0.6,
}  # fmt: skip
GOOD_TASKS: list[Content] = [
    {"name": "a", "labels": ["x", "y"]},
    {"kind": "classify", "name": "a", "labels": ["x", "y"]},
    DETECT,
    {"kind": "segment", "name": "ground", "labels": ["road"], "shape": [512, 1024]},
    {"kind": "embed", "name": "likeness", "size": 128, "normalised": False},
]
BAD_TASKS: dict[str, tuple[Content, str]] = {
    "unknown kind": ({**DETECT, "kind": "guess"}, "kind is"),
    "kind of another type": ({**DETECT, "kind": 3}, "kind is"),
    "one class to choose from": ({"name": "a", "labels": ["x"]}, "labels"),
    "boxes without labels": ({**DETECT, "labels": []}, "labels"),
    "too many boxes": ({**DETECT, "max_boxes": 1001}, "max_boxes"),
    "any score": ({**DETECT, "min_score": 0}, "min_score"),
    "overlap above one": ({**DETECT, "nms_iou": 1.5}, "nms_iou"),
    "a field of another kind": ({**DETECT, "shape": [3, 3]}, "shape"),
    "a map too large": ({"kind": "segment", "name": "g", "labels": ["x"], "shape": [1024, 1024]}, "pixels"),
    "no vector": ({"kind": "embed", "name": "e", "size": 0}, "size"),
}


@pytest.mark.parametrize("task", GOOD_TASKS, ids=lambda task: task.get("kind", "none"))
def test_a_task_is_of_the_kind_that_it_states(task: Content) -> None:
    read = TypeAdapter[Task](Task).validate_python(task)
    assert read.kind == task.get("kind", "classify")
    written = read.model_dump(mode="json")
    assert written == {key: value for key, value in task.items() if (key, value) != ("kind", "classify")}
    assert TypeAdapter[Task](Task).validate_python(read) == read


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_task_out_of_bounds_is_refused(case: str) -> None:
    task, words = BAD_TASKS[case]
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(Task).validate_python(task)


def test_a_fit_is_written_only_where_it_is_another() -> None:
    plain = {"resize": 8, "crop": [8, 8], "mean": [0, 0, 0], "deviation": [1, 1, 1]}
    assert Preprocessing.model_validate(plain).model_dump(mode="json") == plain
    assert Preprocessing.model_validate({**plain, "fit": "letterbox"}).model_dump()["fit"] == "letterbox"
    with pytest.raises(ValidationError, match="fit"):
        Preprocessing.model_validate({**plain, "fit": "squash"})
