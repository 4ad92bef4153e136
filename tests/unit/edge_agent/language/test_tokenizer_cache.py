"""Fetched tokenizers: only what was verified and read is kept, and only that is used again."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge_agent.language import tokenizer_cache
from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache, cache_folder
from isthmus.models.errors import InvalidReply, LinkDown
from isthmus.models.messages import TokenizerInfo
from tests.unit.edge_agent.language.scripted import byte_tokenizer

TOKENIZER = byte_tokenizer()
RAW = TOKENIZER.to_bytes()
INFO = TokenizerInfo(TOKENIZER.fingerprint, len(RAW), TOKENIZER.vocabulary)


def send(info: TokenizerInfo) -> bytes:
    return RAW


def never(info: TokenizerInfo) -> bytes:
    raise AssertionError("it is here")


def test_what_was_fetched_is_there_the_next_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first = TokenizerCache(folder).get(INFO, send)
    assert [file.name for file in folder.iterdir()] == [INFO.sha256.hex()]
    again = TokenizerCache(folder).get(INFO, never)
    assert again.encode("a b") == first.encode("a b") == TOKENIZER.encode("a b")
    assert again.fingerprint == INFO.sha256


@pytest.mark.parametrize("content", [b"", RAW[:-1], RAW[:-1] + b" ", RAW + b" "])
def test_a_file_with_another_content_is_fetched_again(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / INFO.sha256.hex()
    file.write_bytes(content)
    assert TokenizerCache(tmp_path).get(INFO, send).vocabulary == INFO.vocabulary
    assert file.read_bytes() == RAW and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_read_is_not_kept(tmp_path: Path) -> None:
    raw = b"not a tokenizer"
    info = TokenizerInfo(hashlib.sha256(raw).digest(), len(raw), INFO.vocabulary)
    with pytest.raises(InvalidReply, match=f"{info.sha256.hex()[:12]} that the cloud sent cannot be used") as caught:
        TokenizerCache(tmp_path).get(info, lambda _: raw)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_another_vocabulary_than_declared_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InvalidReply, match="has the vocabulary .*, the cloud declares 000000000000"):
        TokenizerCache(tmp_path).get(replace(INFO, vocabulary=bytes(32)), send)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def broken(info: TokenizerInfo) -> bytes:
        raise LinkDown("gone")

    with pytest.raises(LinkDown):
        TokenizerCache(tmp_path).get(INFO, broken)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert TokenizerCache(tmp_path / "file").get(INFO, send).vocabulary == INFO.vocabulary
    (tmp_path / INFO.sha256.hex()).mkdir()
    assert TokenizerCache(tmp_path).get(INFO, send).vocabulary == INFO.vocabulary
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["file", INFO.sha256.hex()])


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder("tokenizers") == Path("/cache/isthmus/tokenizers")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("tokenizers") == Path.home() / ".cache/isthmus/tokenizers"


def test_a_replica_that_sends_slowly_does_not_keep_another_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_cache, "OTHERS_S", 0.02)
    sending, end = threading.Event(), threading.Event()

    def slow(info: TokenizerInfo) -> bytes:
        sending.set()
        assert end.wait(10)
        return RAW

    cache = TokenizerCache(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cache.get, INFO, slow)
        assert sending.wait(10)
        assert cache.get(INFO, send).vocabulary == INFO.vocabulary
        end.set()
        assert first.result(10).vocabulary == INFO.vocabulary
    assert [file.name for file in tmp_path.iterdir()] == [INFO.sha256.hex()]
