"""Clients that hold connections, send slowly, or come from another origin, against a real agent on loopback."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.processes import ROOT, EdgeProcess, free_port
from tests.bench.tiny_llama import write_tiny_llama

CONNECTIONS, REQUESTS = 16, 4
LIMITS = ("--client-timeout-s", "1", "--max-connections", str(CONNECTIONS), "--max-requests", str(REQUESTS))
BODY = json.dumps({"model": "edge", "prompt": "hi", "max_tokens": 1}).encode()
JSON = {"Content-Type": "application/json"}
UPLOAD = b"\r\n".join(
    (
        b"POST /v1/completions HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: 9",
        b"",
        b"{",
    )
)
FILES = 128  # descriptors of a process that runs out of them
FEW_FILES = f"""
import resource
from prometheus_client import CollectorRegistry
from isthmus.edge_agent.cli.serve import serve
from isthmus.edge_agent.config import HttpConfig
from isthmus.edge_agent.http.app import create_app
from isthmus.protos.connections import Connections
import sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
config = HttpConfig(listen=sys.argv[1], max_connections=10_000)
if sys.argv[2] == "unbounded":
    Connections.add = lambda *_: None
serve(create_app(CollectorRegistry(), http=config), config, lambda address: print("ready", flush=True))
"""


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProcess]:
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3)
    with EdgeProcess("--model", str(model), "--threads", "1", *LIMITS) as process:
        yield process


def connect(edge: EdgeProcess, data: bytes = b"") -> socket.socket:
    url = urlsplit(edge.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=30)
    connection.sendall(data)
    return connection


def ask(edge: EdgeProcess, path: str = "/v1/completions", body: bytes | None = BODY, **headers: str) -> tuple[int, str]:
    given = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(edge.url + path, body, given)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_slow_bodies_hold_no_admission_slot_and_end_in_a_408(edge: EdgeProcess) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(edge, UPLOAD)) for _ in range(3 * REQUESTS)]
        assert ask(edge)[0] == 200
        for connection in slow:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_connections_without_a_request_are_closed(edge: EdgeProcess) -> None:
    with connect(edge) as silent, connect(edge, UPLOAD[:40]) as half_a_head:
        assert silent.recv(1000) == half_a_head.recv(1000) == b""


@pytest.mark.parametrize("data", [b"", UPLOAD[:40], UPLOAD], ids=["silent", "half a head", "half a body"])
def test_the_health_check_answers_beside_any_number_of_connections(edge: EdgeProcess, data: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(3 * CONNECTIONS):
            stack.enter_context(connect(edge, data))
        assert ask(edge, "/healthz", None) == (200, '{"status":"ok"}')
        assert ask(edge)[0] == 200


def test_pages_of_other_origins_are_refused(edge: EdgeProcess) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Host": "evil.example"}):
        status, text = ask(edge, **headers)
        assert (status, list(json.loads(text)["error"])) == (403, ["message", "code"])
    assert ask(edge, Origin=edge.url)[0] == 200
    assert ask(edge, "/healthz", None, Host="evil.example")[0] == 200


def test_a_prompt_that_cannot_fit_is_refused_with_the_code_that_clients_know(edge: EdgeProcess) -> None:
    for model in ("edge", "auto", "tiny"):
        body = {"model": model, "messages": [{"role": "user", "content": "7" * 4_000_000}]}
        status, text = ask(edge, "/v1/chat/completions", json.dumps(body).encode())
        assert (status, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")


def test_requests_are_counted_by_route_and_code(edge: EdgeProcess) -> None:
    before = counted(edge)
    ask(edge, "/v1/completions", b"x" * (5 << 20))
    ask(edge, "/nothing", None)
    ask(edge)
    after = counted(edge)
    rise = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert rise == {
        ("/v1/completions", "413"): 1,
        ("/v1/completions", "200"): 1,
        ("other", "404"): 1,
        ("/metrics", "200"): 1,
    }


def counted(edge: EdgeProcess) -> dict[tuple[str, str], float]:
    families = {family.name: family for family in text_string_to_metric_families(ask(edge, "/metrics", None)[1])}
    samples = [each for each in families["isthmus_edge_http_requests"].samples if each.name.endswith("_total")]
    return {(each.labels["route"], each.labels["code"]): each.value for each in samples}


@pytest.mark.parametrize("connections", ["bounded", "unbounded"])
def test_running_out_of_file_descriptors_is_survived_and_writes_no_flood(connections: str, tmp_path: Path) -> None:
    """More connections than descriptors; unbounded, the last ones cannot be accepted until others close."""
    address, log = ("127.0.0.1", free_port()), tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-c", FEW_FILES, f"{address[0]}:{address[1]}", connections]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        with ExitStack() as stack:
            for _ in range(FILES + FILES // 4):
                stack.enter_context(socket.create_connection(address, timeout=30))
            if connections == "bounded":
                assert healthy(address)
        assert healthy(address)
    finally:
        process.kill()
        process.wait()
        process.stdout.close() if process.stdout else None
    assert log.stat().st_size < 1000 and "Traceback" not in log.read_text()


def healthy(address: tuple[str, int]) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
    connection.close()
    return status == 200
