from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.transport.channel import open_channel, rpc_error
from isthmus.models.errors import DeadlineExceeded, IsthmusError, LinkDown, Overloaded
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc


class Failure(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, LinkDown),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
def test_a_status_becomes_the_error_that_it_stands_for(code: grpc.StatusCode, error: type[IsthmusError]) -> None:
    found = rpc_error(Failure(code, "the reason"))
    assert type(found) is error and "the reason" in str(found)
    assert type(rpc_error(Failure(code, None))) is error


class Servicer(pb_grpc.IsthmusServicer):
    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(version="here")


def described(channel: grpc.Channel) -> str:
    with channel:
        return str(pb_grpc.IsthmusStub(channel).Describe(pb.DescribeRequest(), timeout=5).version)


def test_with_a_certificate_authority_the_channel_is_encrypted(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("localhost")
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_IsthmusServicer_to_server(Servicer(), server)
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        assert described(open_channel(f"localhost:{port}", Tls(tmp_path / "ca.pem"))) == "here"
        with pytest.raises(grpc.RpcError):
            described(open_channel(f"localhost:{port}", None))
    finally:
        server.stop(None).wait()


def test_without_tls_the_channel_is_plain() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_IsthmusServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert described(open_channel(f"127.0.0.1:{port}", None)) == "here"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_connection_that_fails_names_the_proxy_but_not_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(each, raising=False)
    assert "proxy" not in str(rpc_error(Failure(grpc.StatusCode.UNAVAILABLE, "refused")))
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:1")
    told = str(rpc_error(Failure(grpc.StatusCode.UNAVAILABLE, "refused")))
    assert f"{name} is set" in told and "refused" in told and "secret" not in told
    assert "proxy" not in str(rpc_error(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")))


def test_grpc_connects_through_the_proxy_of_the_environment_unless_no_proxy_names_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_IsthmusServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody listens there
    for each in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(each, raising=False)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            described(open_channel(f"127.0.0.1:{port}", None))
        assert "http_proxy is set" in str(rpc_error(caught.value))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert described(open_channel(f"127.0.0.1:{port}", None)) == "here"
    finally:
        server.stop(None).wait()
