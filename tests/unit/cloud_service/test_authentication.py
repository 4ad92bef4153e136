"""Calls over a real server: who is refused, by which code, and what a device that may not stay sees."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from isthmus.cloud_service import authentication
from isthmus.cloud_service.access import Access, token_digest
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.keys.authority import issue, issue_service, new_authority
from isthmus.cloud_service.keys.folder import KeyFolder
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.server import Server
from isthmus.cloud_service.servicer import Servicer
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.unit.cloud_service.test_server import IdleRunner
from tests.unit.cloud_service.test_servicer import INFO, FakeVision, request

Play = Callable[[str, Server, "FakeVision", CollectorRegistry], Awaitable[None]]


def serve(play: Play, *, access: Path | None = None, tls: Tls | None = None) -> None:
    """Run `play` against a server of this configuration."""

    async def run() -> None:
        registry, vision = CollectorRegistry(), FakeVision()
        metrics = CloudMetrics(registry, [INFO])
        known = Access(access, by_certificate=bool(tls and tls.client_ca))
        servicer = Servicer(vision, LanguageService(), metrics, ByteBudget(1 << 20), known)
        server = Server(servicer, IdleRunner(), IdleRunner(), metrics)
        config = CloudConfig(listen="localhost:0", metrics=None, tls=tls, access=access)
        ports = await server.start(config, registry)
        try:
            await play(f"localhost:{ports.grpc}", server, vision, registry)
        finally:
            await server.drain(1.0)

    asyncio.run(run())


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def first_of(stream: Any) -> Any:
    async for message in stream:
        return message


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def access(tmp_path: Path) -> Path:
    path = tmp_path / "access.json"
    path.write_text(json.dumps({"tokens": {"cam-7": [token_digest("good")], "cam-8": [token_digest("other")]}}))
    return path


def test_without_a_token_every_method_but_health_is_refused(access: Path) -> None:
    async def play(target: str, server: Server, vision: FakeVision, registry: CollectorRegistry) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            for metadata in ((), bearer("wrong"), bearer(""), (("authorization", "good"),), (("device", "cam-7"),)):
                for call in (
                    stub.Describe(pb.DescribeRequest(), metadata=metadata),
                    stub.Infer(request(1), metadata=metadata),
                    first_of(stub.InferStream(iter([request(1)]), metadata=metadata)),
                    first_of(stub.Generate(iter([]), metadata=metadata)),
                    first_of(stub.Tokenizer(pb.TokenizerRequest(), metadata=metadata)),
                    first_of(reflection.ServerReflectionInfo(iter([asked]), metadata=metadata)),
                ):
                    assert await code_of(call) is grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(channel)
            assert await code_of(health.Check(health_pb2.HealthCheckRequest())) is grpc.StatusCode.OK
            assert vision.peers == set()
            for metadata in (bearer("good"), (*bearer("other"), ("device", "cam-7"))):
                await stub.Infer(request(1), metadata=metadata)
            assert vision.peers == {"device cam-7", "device cam-8"}
        count = registry.get_sample_value
        name = "isthmus_cloud_auth_failures_total"
        assert (count(name, {"reason": "no_token"}), count(name, {"reason": "wrong_token"})) == (24, 6)
        assert "cam-7" not in str(list(registry.collect()))

    serve(play, access=access)


def test_a_token_that_is_taken_away_ends_its_streams_and_others_go_on(
    access: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "POLL_S", 0.05)

    async def play(target: str, server: Server, vision: FakeVision, registry: CollectorRegistry) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            streams = [stub.InferStream(metadata=bearer(token)) for token in ("good", "other")]
            for stream in streams:
                await stream.write(request(1))
                assert (await stream.read()).request_id == 1
            access.write_text("{half")
            await asyncio.sleep(0.2)
            await streams[0].write(request(2))
            assert (await streams[0].read()).request_id == 2
            access.write_text(json.dumps({"tokens": {"cam-8": [token_digest("other")]}}))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await streams[0].read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await streams[1].write(request(3))
            assert (await streams[1].read()).request_id == 3
            assert await code_of(stub.Infer(request(1), metadata=bearer("good"))) is grpc.StatusCode.UNAUTHENTICATED

    serve(play, access=access)


def test_beyond_its_quota_a_device_is_told_when_to_come_again_and_others_are_served(access: Path) -> None:
    content = json.loads(access.read_text()) | {"quotas": {"cam-7": {"requests_per_s": 0.01}}}
    access.write_text(json.dumps(content))

    async def play(target: str, server: Server, vision: FakeVision, registry: CollectorRegistry) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            await stub.Infer(request(1), metadata=bearer("good"))
            with pytest.raises(grpc.aio.AioRpcError, match="quota of 0.01 requests a second is used up") as caught:
                await stub.Infer(request(1), metadata=bearer("good"))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            (hint,) = [value for key, value in caught.value.trailing_metadata() if key == "grpc-retry-pushback-ms"]
            assert 90_000 < int(hint) <= 100_000
            for number in range(1, 6):
                await stub.Infer(request(number), metadata=bearer("other"))
        assert registry.get_sample_value("isthmus_cloud_requests_rejected_total", {"reason": "quota"}) == 1

    serve(play, access=access)


def test_a_name_that_looks_like_another_device_s_id_is_not_that_device(tmp_path: Path) -> None:
    """Of certificates that the authority itself signed: a SPIFFE ID as a DNS name, two IDs, an ID of another kind."""
    authority = new_authority()
    for name, pair in (("ca", authority), ("service", issue_service(authority, ["localhost"], 1))):
        (tmp_path / f"{name}.pem").write_bytes(pair.certificate_pem)
        (tmp_path / f"{name}.key").write_bytes(pair.key_pem)
    own = "spiffe://isthmus/device/cam-7"
    uri, dns = x509.UniformResourceIdentifier, x509.DNSName
    purposes = [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    forged = [[dns(own)], [uri(own), uri("spiffe://isthmus/device/cam-8")], [uri(f"{own}/x")], [dns("device cam-7")]]

    async def play(target: str, server: Server, vision: FakeVision, registry: CollectorRegistry) -> None:
        for names in (*forged, [uri(own)]):
            pair = issue(authority, "cam-7", names, purposes, 1)
            credentials = grpc.ssl_channel_credentials(authority.certificate_pem, pair.key_pem, pair.certificate_pem)
            assert "device cam-7" not in vision.peers
            async with grpc.aio.secure_channel(target, credentials) as channel:
                await code_of(pb_grpc.IsthmusStub(channel).Infer(request(1), metadata=bearer("good"), timeout=5))
        assert "device cam-7" in vision.peers

    serve(play, tls=Tls(tmp_path / "service.pem", tmp_path / "service.key", tmp_path / "ca.pem"))


def test_a_renewed_certificate_is_shown_to_the_next_connection_and_one_half_written_is_not(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path / "keys")
    folder.init(("localhost",), 30)
    pem, key = folder.path / "service.pem", folder.path / "service.key"

    async def play(target: str, server: Server, vision: FakeVision, registry: CollectorRegistry) -> None:
        def expires() -> float | None:
            return registry.get_sample_value("isthmus_tls_certificate_not_after_timestamp_seconds")

        async def connect() -> grpc.StatusCode:
            root = (folder.path / "ca.pem").read_bytes()
            async with grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(root)) as channel:
                return await code_of(pb_grpc.IsthmusStub(channel).Infer(request(1), timeout=5))

        assert await connect() is grpc.StatusCode.OK
        first = expires()
        whole = pem.read_bytes()
        pem.write_bytes(whole[:200])
        assert await connect() is grpc.StatusCode.OK and expires() == first
        pem.unlink()
        assert await connect() is grpc.StatusCode.OK and expires() == first
        pem.write_bytes(whole)
        folder.service(("localhost",), 300)
        assert await connect() is grpc.StatusCode.OK
        renewed = expires()
        assert (
            first is not None and renewed is not None and renewed - first > datetime.timedelta(days=200).total_seconds()
        )
        key.write_bytes((folder.path / "ca.key").read_bytes())  # of another certificate
        assert await connect() is grpc.StatusCode.OK and expires() == renewed

    serve(play, tls=Tls(pem, key))
