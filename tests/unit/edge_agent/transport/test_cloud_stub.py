from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import trustme

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.models.errors import InvalidInput
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc


class Servicer(pb_grpc.IsthmusServicer):
    """Says whose certificate and which authorization it sees; a stream answers each request."""

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        (name,) = context.auth_context()["x509_common_name"]
        authorization = dict(context.invocation_metadata()).get("authorization", "")
        return pb.DescribeResponse(version=f"{name.decode()} {authorization}")

    def InferStream(self, requests: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        for request in requests:
            yield pb.InferResponse(request_id=request.request_id)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[tuple[str, Tls, trustme.CA]]:
    """Its address, a device's files, and the authority of both."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("localhost")
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_IsthmusServicer_to_server(Servicer(), server)
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), True)
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    tls = Tls(tmp_path / "ca.pem", tmp_path / "device.pem", tmp_path / "device.key", token_file=tmp_path / "token")
    (tmp_path / "token").write_text("first\n")
    issue(authority, tls, "old")
    yield f"localhost:{port}", tls, authority
    server.stop(None).wait()


def issue(authority: trustme.CA, tls: Tls, name: str) -> None:
    issued = authority.issue_cert("device.example", common_name=name)
    assert tls.certificate is not None and tls.key is not None
    issued.cert_chain_pems[0].write_to_path(str(tls.certificate))
    issued.private_key_pem.write_to_path(str(tls.key))


def described(stub: CloudStub) -> str:
    return stub.Describe(pb.DescribeRequest(), timeout=5).version


def test_renewed_files_are_used_by_later_calls_and_calls_under_way_go_on(cloud: tuple[str, Tls, trustme.CA]) -> None:
    target, tls, authority = cloud
    stub = CloudStub(target, tls)
    assert described(stub) == "old Bearer first" and not stub.renew()
    outgoing: SimpleQueue[pb.InferRequest | None] = SimpleQueue()
    stream = stub.InferStream(iter(outgoing.get, None))
    former = stub._open
    issue(authority, tls, "new")
    assert tls.token_file is not None
    tls.token_file.write_text("second\n")
    assert stub.renew() and described(stub) == "new Bearer second"
    for number in (1, 2):
        outgoing.put(pb.InferRequest(request_id=number))
        assert next(stream).request_id == number
    assert former._calls == 1
    closed = threading.Event()
    former._channel.close = closed.set  # type: ignore[method-assign]
    outgoing.put(None)
    assert list(stream) == [] and closed.wait(5)
    stub.close()


def test_files_that_cannot_be_used_change_nothing_and_are_told_once(
    cloud: tuple[str, Tls, trustme.CA], caplog: pytest.LogCaptureFixture
) -> None:
    target, tls, _ = cloud
    stub = CloudStub(target, tls)
    assert tls.key is not None and tls.token_file is not None
    kept = tls.key.with_suffix(".kept")
    shutil.copy(tls.key, kept)
    tls.key.write_text("half")
    assert not stub.renew() and not stub.renew() and described(stub) == "old Bearer first"
    assert len(caplog.records) == 1 and "device.key: holds no private key" in caplog.records[0].message
    assert caplog.records[0].levelno == logging.WARNING
    kept.replace(tls.key)
    tls.token_file.write_text("")
    assert not stub.renew() and described(stub) == "old Bearer first"
    tls.token_file.write_text("third")
    assert stub.renew() and described(stub) == "old Bearer third"
    stub.close()


def test_files_that_cannot_be_used_at_the_start_are_an_error(cloud: tuple[str, Tls, trustme.CA]) -> None:
    target, tls, _ = cloud
    assert tls.ca is not None
    tls.ca.write_text("junk")
    with pytest.raises(InvalidInput, match="ca.pem: holds no certificate in PEM"):
        CloudStub(target, tls)


def test_a_token_never_leaves_without_tls(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with pytest.raises(InvalidInput, match="a token needs --tls-ca or --tls"):
        Tls(token_file=tmp_path / "token")
    with pytest.raises(InvalidInput, match="--tls-certificate needs --tls-ca, or --tls"):
        Tls(None, tmp_path / "a", tmp_path / "b")
    assert not Tls().on and Tls(system=True).on
