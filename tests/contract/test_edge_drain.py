"""SIGTERM to an agent in traffic: every request that reached it is answered, and then it ends."""

from __future__ import annotations

import http.client
import io
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import EdgeProcess
from tests.bench.tiny_llama import write_tiny_llama

CLIENTS = 16
TRAFFIC_S = 1.0


class Client(threading.Thread):
    """Posts photos until the agent is gone; a new connection where the agent closed the last one after an answer."""

    def __init__(self, url: str, body: bytes, keep_alive: bool) -> None:
        super().__init__()
        self._address, self._body, self._keep_alive = urlsplit(url).netloc, body, keep_alive
        self.answered = 0
        self.cut: list[str] = []  # requests that were sent and not answered

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=30)
        headers = {} if self._keep_alive else {"Connection": "close"}
        while True:
            try:
                connection.connect() if connection.sock is None else None
            except OSError:  # it does not listen any more
                return
            try:
                connection.request("POST", "/v1/infer?deadline_ms=10000", self._body, headers)
                reply = connection.getresponse()
                reply.read()
            except (OSError, http.client.HTTPException) as error:
                self.cut.append(repr(error))
                return
            assert reply.status in (200, 503)
            self.answered += 1


@pytest.fixture
def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.resize((1024, 1024)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive", "close"])
def test_sigterm_in_traffic_cuts_no_request(tiny_bundle: Bundle, png: bytes, keep_alive: bool) -> None:
    with EdgeProcess("--bundle", str(tiny_bundle.folder), "--threads", "1") as edge:
        clients = [Client(edge.url, png, keep_alive) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(TRAFFIC_S)
        edge.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(30)
        assert edge.process.wait(30) == 0, edge.read_log()
        assert "Traceback" not in edge.read_log()
    assert all(client.answered for client in clients)
    assert [error for client in clients for error in client.cut] == []


def test_a_request_that_does_not_end_is_cancelled_after_the_drain(tmp_path: Path) -> None:
    """A body that never comes: the agent ends all the same."""
    model = write_tiny_llama(tmp_path / "tiny", scale=0.3)
    with EdgeProcess("--model", str(model), "--threads", "1", "--drain-s", "2") as edge:
        url = urlsplit(edge.url)
        with socket.create_connection((url.hostname, url.port), timeout=30) as stuck:
            head = (
                b"POST /v1/completions HTTP/1.1",
                b"Host: localhost",
                b"Content-Type: application/json",
                b"Content-Length: 99",
            )
            stuck.sendall(b"\r\n".join((*head, b"", b"")))
            time.sleep(0.5)
            start_s = time.monotonic()
            edge.process.send_signal(signal.SIGTERM)
            assert edge.process.wait(30) == 0, edge.read_log()
        assert 1.5 < time.monotonic() - start_s < 8


def test_the_bound_port_is_printed(tiny_bundle: Bundle) -> None:
    with EdgeProcess("--bundle", str(tiny_bundle.folder), "--threads", "1") as edge:
        assert f"on {edge.url}, no cloud" in edge.read_log()
