"""The GGUF container, with files written by the reference library, and files that are cut or altered."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.gguf_file import GgufFile, map_file

VALUES_NK = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensors and a key of every kind that models use."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.rope.freq_base", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3])
    writer.add_tensor("plain", VALUES_NK)
    packed = gguf.quants.quantize(VALUES_NK, GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_and_tensors(path: Path) -> None:
    file = GgufFile(path)
    assert file.fields["general.architecture"] == "llama" and file.fields["llama.block_count"] == 7
    assert file.fields["llama.rope.freq_base"] == 0.5 and file.fields["tokenizer.ggml.add_bos_token"] is True
    assert file.fields["tokenizer.ggml.tokens"] == ["a", "é"] and file.fields["tokenizer.ggml.token_type"] == [1, 3]
    assert set(file.tensors) == {"plain", "packed"}
    assert file.tensors["plain"].shape == file.tensors["packed"].shape == (3, 64)
    assert file.tensors["packed"].size == 3 * 2 * 20
    np.testing.assert_array_equal(file.floats("plain"), VALUES_NK)
    assert file.bytes_of("packed").shape == (3, 40) and not file.bytes_of("packed").flags.writeable
    np.testing.assert_allclose(file.floats("packed"), VALUES_NK, atol=0.3)


def changed(path: Path, tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "changed.gguf").write_bytes(data)
    return tmp_path / "changed.gguf"


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, (1).to_bytes(4, "little"), "GGUF version 1 or big-endian"),
        (4, (3).to_bytes(4, "big"), "or big-endian"),
        (8, (1 << 60).to_bytes(8, "little"), "tensors, more than the file holds"),
        (16, (1 << 60).to_bytes(8, "little"), "keys, more than the file holds"),
    ],
)
def test_hostile_heads_are_refused(path: Path, tmp_path: Path, offset: int, content: bytes, words: str) -> None:
    data = path.read_bytes()
    with pytest.raises(BundleError, match=words):
        GgufFile(changed(path, tmp_path, data[:offset] + content + data[offset + len(content) :]))


@given(share=st.floats(0, 0.999))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_a_file_cut_anywhere_is_refused(path: Path, tmp_path: Path, share: float) -> None:
    end = max(tensor.offset + tensor.size for tensor in GgufFile(path).tensors.values())  # padding may follow
    with pytest.raises(BundleError):
        GgufFile(changed(path, tmp_path, path.read_bytes()[: int(share * end)]))


def test_files_that_cannot_be_mapped_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, words in (("empty", "empty or cannot be read"), ("missing", "no such file"), (".", "no such file")):
        with pytest.raises(BundleError, match=words):
            map_file(tmp_path / name)
