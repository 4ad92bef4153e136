"""Failed TLS handshakes in plain lines: gRPC writes them to file descriptor 2 alone, in OpenSSL's words.

descriptor 2 -> a pipe -> a thread: a line about a handshake is counted and logged, every other goes on as it was
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

EVERY_S = 60.0  # a line for a cause, at most so often: devices try again every two seconds
READ_BYTES = 64 << 10
HANDSHAKE = re.compile(rb"^[IWE]\d{4} [^\]]*ssl_transport_security[^\]]*\] ")
CAUSES = {
    b"PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "no_certificate",
        "it has no certificate, which --tls-client-ca asks for",
    ),
    b"certificate has expired": ("expired", "its certificate has expired, by this machine's clock"),
    b"certificate is not yet valid": ("expired", "its certificate is not valid yet, by this machine's clock"),
    b"CERTIFICATE_VERIFY_FAILED": ("unknown_authority", "no authority of --tls-client-ca signed its certificate"),
    b"UNKNOWN_CA": ("refused_by_device", "it does not trust the authority of this service's certificate"),
    b"WRONG_VERSION_NUMBER": ("not_tls", "it does not speak TLS"),
    b"HTTP_REQUEST": ("not_tls", "it does not speak TLS"),
}
OTHER = ("handshake", "it found no common way to speak TLS with this service")
REASONS = tuple(dict.fromkeys(reason for reason, _ in (*CAUSES.values(), OTHER)))

log = logging.getLogger("isthmus.cloud")


class HandshakeLog:
    """Counts failed handshakes by cause, and logs the first of each and then one a minute."""

    def __init__(self, count: Callable[[str], None]) -> None:
        """`count` is called with one of REASONS, in the thread that reads."""
        self._count = count
        self._said_s: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def take(self, line: bytes) -> bool:
        """Whether the line is gRPC's about a handshake, which is then counted and need not be shown."""
        if not HANDSHAKE.match(line):
            return False
        if b"Handshake failed" in line:
            self._record(*next((cause for pattern, cause in CAUSES.items() if pattern in line), OTHER))
        return True

    def _record(self, reason: str, words: str) -> None:
        self._count(reason)
        now_s = time.monotonic()
        if now_s - self._said_s.get(words, float("-inf")) < EVERY_S:
            self._unsaid[words] = self._unsaid.get(words, 0) + 1
            return
        more = self._unsaid.pop(words, 0)
        self._said_s[words] = now_s
        log.warning("a device could not connect: %s%s", words, f" ({more} more times since)" if more else "")


@contextlib.contextmanager
def watching(log_: HandshakeLog) -> Iterator[None]:
    """Read what native code writes to descriptor 2. What Python writes to sys.stderr goes past it."""
    sys.stderr.flush()
    original, (reader, writer) = os.dup(2), os.pipe()
    os.set_blocking(writer, False)  # rather lose a line than let gRPC wait
    python_stderr, sys.stderr = sys.stderr, io.TextIOWrapper(os.fdopen(os.dup(original), "wb", 0), write_through=True)
    moved = move_handlers(python_stderr, sys.stderr)
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=forward, args=(reader, original, log_), name="handshakes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(original, 2)  # the pipe ends, unless a child has it
        thread.join(1.0)
        sys.stderr = python_stderr
        for handler in moved:
            handler.setStream(cast(io.TextIOBase, python_stderr))


def move_handlers(old: object, new: io.TextIOWrapper) -> list[logging.StreamHandler[io.TextIOBase]]:
    """Let the root logger's handlers of one stream write to another. Returns them."""
    found = [each for each in logging.root.handlers if isinstance(each, logging.StreamHandler) and each.stream is old]
    for handler in found:
        handler.setStream(new)
    return found


def forward(reader: int, original: int, log_: HandshakeLog) -> None:
    """Until the pipe ends: lines about handshakes to `log_`, everything else to `original`."""
    rest = b""
    while chunk := os.read(reader, READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > READ_BYTES:  # no line of gRPC's
            lines, rest = [*lines, rest], b""
        shown = b"".join(line + b"\n" for line in lines if not log_.take(line))
        if shown:
            os.write(original, shown)
    if rest:
        os.write(original, rest)
    os.close(reader)
