"""The service's certificate, taken up again when its files change. Connections that are open go on with the old one."""

from __future__ import annotations

import datetime
import logging
import threading

import grpc

from isthmus.cloud_service.config import Tls
from isthmus.models.errors import InvalidInput
from isthmus.protos.certificates import Pems, Stamp, expiry_problem, read_pems, stamp

EXPIRES_SOON = datetime.timedelta(days=14)

log = logging.getLogger("isthmus.cloud")


class RotatingCertificate:
    """Before each handshake the files are looked at. Files that cannot be used change nothing, and are logged once.

    A half-written file is one of these: certificate and key must belong together.
    """

    def __init__(self, tls: Tls) -> None:
        """Raises InvalidInput, one line, for a file that cannot be read or used."""
        self._tls = tls
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._seen = self._stamp()
        self._pems = self._read()
        self._tell()

    @property
    def not_after_s(self) -> float:
        """When the certificate expires, seconds since 1970."""
        return self._pems.not_after.timestamp() if self._pems.not_after else 0.0

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a server."""
        asks = self._tls.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(configuration(self._pems), self._renewed, asks)

    def refresh(self) -> bool:
        """Look at the files. Returns whether others are used from now on."""
        with self._lock:
            found = self._stamp()
            if found == self._seen:
                return False
            self._seen = found
            try:
                pems = self._read()
            except InvalidInput as error:
                log.warning("the renewed certificate is not used: %s", error)
                return False
            if pems == self._pems:
                return False
            self._pems = pems
        log.info("a renewed certificate is used for new connections")
        self._tell()
        return True

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before a handshake; None for no change."""
        self.refresh()
        return configuration(self._pems)

    def _read(self) -> Pems:
        return read_pems(self._tls.certificate, self._tls.key, self._tls.client_ca)

    def _stamp(self) -> Stamp:
        return stamp((self._tls.certificate, self._tls.key, self._tls.client_ca))

    def _tell(self) -> None:
        """Log what is or will soon be wrong with the certificate in use."""
        own = self._pems.certificates[0]
        if (problem := expiry_problem(own)) is not None:
            log.warning("%s: the certificate %s, so devices refuse it", self._tls.certificate, problem)
        elif own.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < EXPIRES_SOON:
            log.warning("%s: the certificate expires on %s UTC", self._tls.certificate, own.not_valid_after_utc)


def configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.certificate)], pems.roots)
