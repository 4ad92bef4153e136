"""Why a TLS connection to a cloud fails, in one plain line instead of OpenSSL's words.

gRPC's text says what is wrong with the cloud's certificate. A cloud that refuses the device's own just closes the
connection: a handshake of our own tells that apart.
"""

from __future__ import annotations

import datetime
import socket
import ssl

from isthmus.edge_agent.config import Tls
from isthmus.models.address import parse_address

PROBE_TIMEOUT_S = 2.0
NOT_TLS = "the cloud does not speak TLS on this port: leave out --tls and --tls-ca, or turn TLS on there"
UNKNOWN_AUTHORITY = (
    "the cloud's certificate is not signed by an authority that this device trusts: --tls-ca names another one"
)
OTHER_NAME = "the cloud's certificate is for another name than the one that --cloud gives"
CLOSED = ("Socket closed", "Connection reset", "Broken pipe")  # of a connection that was made
CAUSES = {
    "certificate has expired": "the cloud's certificate has expired, by this device's clock: {now}",
    "certificate is not yet valid": "the cloud's certificate is not valid yet, by this device's clock: {now}",
    "unable to get local issuer certificate": UNKNOWN_AUTHORITY,
    "unable to get issuer certificate": UNKNOWN_AUTHORITY,
    "unable to verify the first certificate": UNKNOWN_AUTHORITY,
    "self signed certificate": UNKNOWN_AUTHORITY,
    "self-signed certificate": UNKNOWN_AUTHORITY,
    "Hostname Verification Check failed": OTHER_NAME,
    "Hostname mismatch": OTHER_NAME,
    "IP address mismatch": OTHER_NAME,
    "WRONG_VERSION_NUMBER": NOT_TLS,
    "CERTIFICATE_VERIFY_FAILED": "the cloud's certificate cannot be verified",
    "handshake failed": "the cloud and this device found no common way to speak TLS",
}


def plain_words(text: str) -> str | None:
    """What gRPC's or OpenSSL's text of a failed handshake means; None where it is about something else."""
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return next((words.format(now=now) for pattern, words in CAUSES.items() if pattern.lower() in text.lower()), None)


def explain_closed(text: str, target: str, tls: Tls | None) -> str | None:
    """Why the cloud at `target` closes each connection, by a handshake; None where that tells nothing.

    Takes PROBE_TIMEOUT_S at most.
    """
    if not any(pattern in text for pattern in CLOSED):
        return None
    with_tls = tls is not None and tls.on
    try:
        open_cloud = try_handshake(target, tls if with_tls else None)
    except ssl.SSLError as error:
        return plain_words(str(error)) if with_tls else None
    except OSError:
        return None
    if not with_tls:
        return "the cloud speaks TLS: --tls-ca names its authority, or --tls trusts those of this system"
    return None if open_cloud or tls is None else refused_certificate(tls)


def try_handshake(target: str, tls: Tls | None) -> bool:
    """Whether the cloud goes on after a handshake. Raises OSError; without `tls` no certificate is checked."""
    address, context = parse_address(target), ssl.create_default_context()
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        if tls.ca is not None:
            context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((address.host, address.port), PROBE_TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=address.host) as wrapped,
    ):
        try:
            return bool(wrapped.recv(1))  # an HTTP/2 server speaks first
        except ssl.SSLError:
            return False


def refused_certificate(tls: Tls) -> str:
    """What may be wrong with this device's certificate, in the eyes of a cloud that closes the connection."""
    from isthmus.protos.certificates import expiry_problem, read_pems

    if tls.certificate is None:
        return "the cloud asks for a certificate of this device: --tls-certificate and --tls-key"
    own = read_pems(tls.certificate, tls.key, None).certificates[0]
    if (problem := expiry_problem(own)) is not None:
        return f"the cloud refuses this device's certificate, which {problem}"
    issuer = own.issuer.rfc4514_string()[:100]
    return f"the cloud refuses this device's certificate: it must trust its authority ({issuer}) by --tls-client-ca"
