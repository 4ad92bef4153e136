from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from isthmus.models.bundle.files import fingerprint_of
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.vision.bundle import Bundle
from tests.conftest import Parts

# Of the paper bundle: canonical JSON and hashing may never change.
FINGERPRINT = "0424597c8780fbe981b6e087584444ace94461b7bd8f21b8d00a79b3535df4f2"


def refused(folder: Path, *words: str) -> None:
    """Opening `folder` raises a BundleError whose message has all of `words`."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    for word in words:
        assert word in str(caught.value)


def test_what_is_written_is_read(paper: Parts, tmp_path: Path) -> None:
    opened = Bundle.open(paper.write(tmp_path / "b"))
    assert {name: opened.read(name) for name in paper.files} == paper.files
    content = opened.manifest.model_dump(mode="json", exclude_none=True)
    assert {key: content[key] for key in paper.manifest} == paper.manifest


def test_weights_come_back_as_arrays(paper: Parts, tmp_path: Path) -> None:
    weights = Bundle.open(paper.write(tmp_path / "b")).tensors("weights.safetensors")
    np.testing.assert_array_equal(weights["w"], np.arange(6).reshape(2, 3))


def test_manifest_bytes_are_golden(paper: Parts, tmp_path: Path, golden: Callable[[str, bytes], None]) -> None:
    golden("manifest_v4.json", (paper.write(tmp_path / "b") / "manifest.json").read_bytes())


def test_fingerprint_is_golden(paper: Parts, tmp_path: Path) -> None:
    assert Bundle.open(paper.write(tmp_path / "b")).fingerprint.hex() == FINGERPRINT


def test_fingerprint_does_not_depend_on_the_order_of_fields(paper: Parts) -> None:
    backwards = dict(reversed(paper.manifest.items()))
    assert fingerprint_of(paper.manifest) == fingerprint_of(backwards)


def test_fingerprint_changes_with_any_file(paper: Parts, tmp_path: Path) -> None:
    before = Bundle.open(paper.write(tmp_path / "b")).fingerprint
    paper.files["head0.onnx"] += b"!"
    assert Bundle.open(paper.write(tmp_path / "b")).fingerprint != before


@pytest.mark.parametrize("name", ["weights.safetensors", "tables.safetensors", "head0.onnx", "encoder.onnx"])
def test_a_changed_byte_is_refused(paper: Parts, tmp_path: Path, name: str) -> None:
    path = paper.write(tmp_path / "b") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "b", name, "SHA-256")


def test_a_truncated_file_is_refused(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "head0.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path / "b", "head0.onnx", "16 bytes, the manifest says 17")


def test_a_longer_file_is_refused_without_being_read_whole(paper: Parts, tmp_path: Path) -> None:
    with (paper.write(tmp_path / "b") / "head0.onnx").open("r+b") as file:
        file.truncate(1 << 40)  # sparse; reading it would not fit into memory
    refused(tmp_path / "b", "head0.onnx", "18 bytes, the manifest says 17")


def test_a_missing_file_is_refused(paper: Parts, tmp_path: Path) -> None:
    (paper.write(tmp_path / "b") / "encoder.onnx").unlink()
    refused(tmp_path / "b", "encoder.onnx", "cannot be read")


def test_a_symlinked_file_is_refused(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "encoder.onnx"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    refused(tmp_path / "b", "encoder.onnx", "not a regular file")


def test_a_symlinked_manifest_is_refused(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "manifest.json"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    refused(tmp_path / "b", "manifest.json", "not a regular file")


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "encoder.onnx"
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path / "b", "encoder.onnx", "not a regular file")


def test_no_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "b", "no such bundle folder")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "manifest.json", "cannot be read")


def test_a_wrong_fingerprint_is_refused(paper: Parts, tmp_path: Path) -> None:
    path = paper.write(tmp_path / "b") / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"paper"', '"paperr"', 1), encoding="utf-8")
    refused(tmp_path / "b", "manifest.json", "fingerprint")


def test_reading_a_file_that_is_not_listed_is_refused(paper: Parts, tmp_path: Path) -> None:
    opened = Bundle.open(paper.write(tmp_path / "b"))
    with pytest.raises(BundleError, match="lists no file"):
        opened.read("manifest.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(paper: Parts, tmp_path: Path, value: float) -> None:
    paper.replace(tmp_path / "b", "weights.safetensors", safetensors.numpy.save({"w": np.array([1.0, value])}))
    opened = Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError, match=r"weights\.safetensors: tensor w .* not finite"):
        opened.tensors("weights.safetensors")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0{}junk",
        b'\x3c\0\0\0\0\0\0\0{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}      \0\0',
    ],
    ids=["empty", "header of 2**64 bytes", "trailing bytes", "a type NumPy lacks"],
)
def test_what_is_not_safetensors_is_refused(paper: Parts, tmp_path: Path, data: bytes) -> None:
    opened = Bundle.open(paper.replace(tmp_path / "b", "weights.safetensors", data))
    with pytest.raises(BundleError, match=r"weights\.safetensors: not a safetensors file"):
        opened.tensors("weights.safetensors")


def test_a_failed_write_leaves_the_old_bundle(paper: Parts, tmp_path: Path) -> None:
    before = Bundle.open(paper.write(tmp_path / "b")).fingerprint
    paper.manifest["tasks"] = [{"name": "defect", "labels": ["only one"]}]
    with pytest.raises(BundleError, match="labels"):
        paper.write(tmp_path / "b")
    assert Bundle.open(tmp_path / "b").fingerprint == before


def test_a_crash_while_writing_leaves_the_old_bundle(
    paper: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(paper.write(tmp_path / "b")).fingerprint
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError("disk full")))
        paper.write(tmp_path / "b")
    assert Bundle.open(tmp_path / "b").fingerprint == before
    assert Bundle.open(paper.write(tmp_path / "b")).fingerprint == before  # remains of the crash are in no one's way


def test_bytes_that_do_not_reach_the_disk_leave_the_old_bundle(
    paper: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(paper.write(tmp_path / "b")).fingerprint
    whole = Path.write_bytes
    with monkeypatch.context() as patched, pytest.raises(BundleError, match="the manifest says"):
        patched.setattr(Path, "write_bytes", lambda path, data: whole(path, data[:-1]))
        paper.write(tmp_path / "b")
    assert Bundle.open(tmp_path / "b").fingerprint == before


def test_writing_replaces_every_old_file(paper: Parts, tmp_path: Path) -> None:
    paper.files["extra"] = b"x"
    paper.write(tmp_path / "b")
    del paper.files["extra"]
    paper.write(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", *sorted([*paper.files, "manifest.json"])]


def photos(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (folder / name).write_bytes(b"mine")
    return folder


def noted(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder


def app(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web app"}')
    return folder


def listing(folder: Path) -> list[tuple[str, bytes]]:
    found = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return [(path.name, path.read_bytes()) for path in found]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda paper, folder: photos(folder), "it holds a.jpg, b.jpg, c.jpg and 1 more; only a bundle is replaced"),
        (lambda paper, folder: noted(paper.write(folder)), "it holds notes.txt; only"),
        (lambda paper, folder: app(folder), "it holds manifest.json; only"),
        (lambda paper, folder: folder.write_text("mine"), "is not a folder"),
    ],
    ids=["photos", "a bundle with notes", "another manifest", "a file"],
)
def test_what_is_no_bundle_is_not_replaced(
    paper: Parts, tmp_path: Path, make: Callable[[Parts, Path], object], words: str
) -> None:
    make(paper, tmp_path / "b")
    before = listing(tmp_path / "b")
    with pytest.raises(InvalidInput, match=words):
        paper.write(tmp_path / "b")
    assert listing(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_empty_folder_and_a_damaged_bundle_are_replaced(paper: Parts, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (paper.write(tmp_path / "b") / "head0.onnx").write_bytes(b"damaged")
    assert (paper.write(tmp_path / "b") / "head0.onnx").read_bytes() == paper.files["head0.onnx"]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_an_old_bundle_comes_back_when_the_new_one_does_not_get_in_place(
    paper: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = listing(paper.write(tmp_path / "b"))
    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    paper.files["extra"] = b"x"
    with pytest.raises(type(error)):
        paper.write(tmp_path / "b")
    assert listing(tmp_path / "b") == before


def test_writing_refuses_a_file_name_that_leaves_the_folder(paper: Parts, tmp_path: Path) -> None:
    paper.files["../escaped"] = b"x"
    with pytest.raises(BundleError, match="files"):
        paper.write(tmp_path / "b")
    assert not (tmp_path / "escaped").exists()


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "isthmus.models.bundle", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_module_is_a_command(paper: Parts, tmp_path: Path) -> None:
    done = command("verify", paper.write(tmp_path / "b"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok: ")
