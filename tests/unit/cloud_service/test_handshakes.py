from __future__ import annotations

import logging
import os
import sys

import pytest

from isthmus.cloud_service import handshakes as module
from isthmus.cloud_service.handshakes import REASONS, HandshakeLog, watching

START = b"I1129 07:04:35.567790   30037 ssl_transport_security.cc:2563] "
FAILED = START + b"Handshake failed with error SSL_ERROR_SSL: error:100000c0:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context", "no_certificate"),
        (b"CERTIFICATE_VERIFY_FAILED: certificate has expired", "expired"),
        (b"CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "unknown_authority"),
        (b"WRONG_VERSION_NUMBER: Invalid certificate verification context", "not_tls"),
        (b"NO_SHARED_CIPHER", "handshake"),
    ],
)
def test_a_failed_handshake_is_counted_and_said_once_in_plain_words(
    text: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    log = HandshakeLog(counted.append)
    assert log.take(FAILED + text) and log.take(FAILED + text)
    assert counted == [reason] * 2 and reason in REASONS
    (record,) = caplog.records
    assert "could not connect" in record.message and "SSL" not in record.message


def test_after_a_minute_it_is_said_again_with_how_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    log = HandshakeLog(lambda reason: None)
    for now_s[0] in (0.0, 1.0, 2.0, 61.0):
        log.take(FAILED + b"NO_SHARED_CIPHER")
    assert len(caplog.records) == 2 and caplog.records[1].message.endswith("(2 more times since)")


def test_what_native_code_writes_goes_on_and_what_it_says_of_handshakes_does_not(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    with watching(HandshakeLog(counted.append)):
        os.write(2, b"a crash\nhalf a line, " + FAILED + b"\n" + FAILED + b"HTTP_REQUEST\nthe end")
        sys.stderr.write("from Python\n")
        logging.getLogger("isthmus.cloud").info("a line")
    os.write(2, b"\nafter\n")
    shown = capfd.readouterr().err
    assert counted == ["not_tls"]
    for text in ("a crash\n", "half a line", "the end", "from Python\n", "\nafter\n"):
        assert text in shown
    assert "HTTP_REQUEST" not in shown
