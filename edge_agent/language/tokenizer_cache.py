"""Tokenizers of clouds' models: kept on this machine by content, fetched once.

    file of that SHA-256 -> the tokenizer
    none, or another content -> fetched, verified, read, and only then written, whole or not at all

Knows nothing about gRPC or about models.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from isthmus.models.errors import BundleError, InvalidReply
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import TokenizerInfo
from isthmus.models.user_folders import user_folder

OTHERS_S = 5.0  # that one replica waits while another sends the same tokenizer, or sends it slowly


def cache_folder(kind: str) -> Path:
    """Where what can be fetched or made again is kept: `isthmus/KIND` in XDG_CACHE_HOME, by default ~/.cache."""
    return user_folder("cache") / kind


class TokenizerCache:
    """A folder, which need not exist or be writable. Safe to call from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()  # replicas that answer at once fetch one after the other

    def get(self, info: TokenizerInfo, fetch: Callable[[TokenizerInfo], bytes]) -> Tokenizer:
        """The tokenizer that a cloud declares. Raises InvalidReply for one that cannot be used, and as `fetch`."""
        alone = self._lock.acquire(timeout=OTHERS_S)
        try:
            raw = self._load(info)
            fetched = raw is None
            raw = fetch(info) if raw is None else raw
            tokenizer = read(raw, info)
            if fetched:
                self._save(info, raw)
            return tokenizer
        finally:
            if alone:
                self._lock.release()

    def _load(self, info: TokenizerInfo) -> bytes | None:
        path = self._folder / info.sha256.hex()
        with suppress(OSError):
            if path.stat().st_size == info.size_bytes:
                raw = path.read_bytes()
                return raw if hashlib.sha256(raw).digest() == info.sha256 else None
        return None

    def _save(self, info: TokenizerInfo, raw: bytes) -> None:
        """Where that is not possible it is fetched again next time."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="part-", delete=False) as part:
                try:
                    part.write(raw)
                    part.close()
                    os.replace(part.name, self._folder / info.sha256.hex())
                except OSError:
                    os.unlink(part.name)
                    raise


def read(raw: bytes, info: TokenizerInfo) -> Tokenizer:
    """Raises InvalidReply for a tokenizer that cannot be read, or is of another vocabulary than declared."""
    try:
        tokenizer = Tokenizer.from_bytes(raw)
    except BundleError as error:
        raise InvalidReply(
            f"the tokenizer {info.sha256.hex()[:12]} that the cloud sent cannot be used: {error}"
        ) from error
    if tokenizer.vocabulary != info.vocabulary:
        raise InvalidReply(
            f"the tokenizer {info.sha256.hex()[:12]} that the cloud sent has the vocabulary"
            f" {tokenizer.vocabulary.hex()[:12]}, the cloud declares {info.vocabulary.hex()[:12]}"
        )
    return tokenizer
