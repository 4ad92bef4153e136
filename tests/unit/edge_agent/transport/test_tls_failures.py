from __future__ import annotations

import pytest

from isthmus.edge_agent.transport.tls_failures import explain_closed, plain_words

HANDSHAKE = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{HANDSHAKE}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "not signed by an authority"),
        (f"{HANDSHAKE}CERTIFICATE_VERIFY_FAILED: self-signed certificate", "not signed by an authority"),
        (f"{HANDSHAKE}CERTIFICATE_VERIFY_FAILED: certificate has expired", "has expired, by this device's clock: 20"),
        (
            f"{HANDSHAKE}CERTIFICATE_VERIFY_FAILED: certificate is not yet valid",
            "not valid yet, by this device's clock",
        ),
        (f"{HANDSHAKE}CERTIFICATE_VERIFY_FAILED: something new", "cannot be verified"),
        (f"{HANDSHAKE}WRONG_VERSION_NUMBER: Invalid certificate verification context", "does not speak TLS"),
        (f"{HANDSHAKE}NO_SHARED_CIPHER", "no common way to speak TLS"),
        ("UNAUTHENTICATED: Hostname Verification Check failed.", "for another name than the one that --cloud gives"),
    ],
)
def test_a_failed_handshake_is_said_in_plain_words(text: str, words: str) -> None:
    told = plain_words(f"failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: {text}: OK")
    assert told is not None and words in told
    assert "SSL" not in told and "OPENSSL" not in told and "\n" not in told


def test_other_failures_keep_their_words() -> None:
    assert plain_words("failed to connect to all addresses; connection refused") is None
    assert explain_closed("connection refused", "localhost:1", None) is None
    assert explain_closed("Socket closed", "127.0.0.1:1", None) is None  # nobody listens there
