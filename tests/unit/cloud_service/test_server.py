from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import urllib.request
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.config import CloudConfig, Tls
from isthmus.cloud_service.server import bind, open_handoffs, serve, serve_metrics
from isthmus.cloud_service.servicer import Servicer
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.messages import CloudRequest, Codec, Opening, Payload, Round
from isthmus.models.vision.bundle import Bundle
from isthmus.protos import limits, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def try_bind(address: str, tls: Tls | None = None) -> int:
    async def play() -> int:
        return bind(grpc.aio.server(options=limits.server_options()), address, tls)

    return asyncio.run(play())


def test_port_zero_is_a_port_that_was_free() -> None:
    assert try_bind("127.0.0.1:0") > 0


def test_a_taken_port_is_an_error_that_names_it(taken: str) -> None:
    with pytest.raises(InvalidInput, match=taken):
        try_bind(taken)


def test_certificates_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "none.pem", tmp_path / "none.key"))


def test_files_that_are_no_certificates_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_bytes(b"no certificate")
    with pytest.raises(InvalidInput, match="cannot listen"):
        try_bind("127.0.0.1:0", Tls(tmp_path / "junk.pem", tmp_path / "junk.pem"))


def test_metrics_are_served_over_http() -> None:
    port = serve_metrics("127.0.0.1:0", CollectorRegistry())
    assert port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert reply.status == 200


def test_metrics_can_be_left_out() -> None:
    assert serve_metrics(None, CollectorRegistry()) is None


@pytest.mark.parametrize("address", ["9101", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000"])
def test_a_wrong_metrics_address_is_named(address: str) -> None:
    with pytest.raises(InvalidInput, match=f"cannot serve metrics on {address}"):
        serve_metrics(address, CollectorRegistry())


def test_a_taken_metrics_port_is_named(taken: str) -> None:
    with pytest.raises(InvalidInput, match=taken):
        serve_metrics(taken, CollectorRegistry())


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        asyncio.run(serve(CloudConfig(bundles=(tmp_path,), listen="127.0.0.1:0", metrics=None)))


async def listening(serving: asyncio.Task[None], caplog: pytest.LogCaptureFixture) -> str:
    """The service's address, from its log."""
    while not (ports := [record.args[1] for record in caplog.records if record.msg.startswith("serving")]):  # type: ignore[index]
        if serving.done():
            serving.result()
        await asyncio.sleep(0.01)
    return f"127.0.0.1:{ports[0]}"


def request(bundle: Bundle, request_id: int) -> pb.InferRequest:
    codec = bundle.codec(0)
    payload = Payload(Codec.BOTTLENECK, 0, 0, codec.encode(np.zeros(codec.shape_CHW, np.int32), 0))
    return wire.pack_request(CloudRequest(request_id, bundle.fingerprint, 10.0, payload))


def test_sigterm_turns_health_off_says_farewell_and_waits_for_streams(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        config = CloudConfig(bundles=(tiny_bundle.folder,), listen="127.0.0.1:0", metrics=None)
        serving = asyncio.create_task(serve(config))
        async with grpc.aio.insecure_channel(await listening(serving, caplog)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            check = health_pb2.HealthCheckRequest(service="isthmus.v1.Isthmus")
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
            call = pb_grpc.IsthmusStub(channel).InferStream()
            await call.write(request(tiny_bundle, 1))
            assert (await call.read()).request_id == 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await call.read()).request_id == 0
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not serving.done()
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            await serving

    watched(play(), caplog)
    assert caplog.messages[-1] == "drained"


def test_a_stream_that_arrives_with_sigterm_is_answered_too(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted by gRPC, its handler not yet begun: not counted, so that `drained` returns at once."""

    async def uncounted(servicer: Servicer) -> None:
        return None

    monkeypatch.setattr(Servicer, "drained", uncounted)

    async def play() -> None:
        config = CloudConfig(bundles=(tiny_bundle.folder,), listen="127.0.0.1:0", metrics=None)
        serving = asyncio.create_task(serve(config))
        async with grpc.aio.insecure_channel(await listening(serving, caplog)) as channel:
            call = pb_grpc.IsthmusStub(channel).InferStream()
            await call.write(request(tiny_bundle, 1))
            assert (await call.read()).request_id == 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await call.read()).request_id == 0
            await asyncio.sleep(0.1)
            await call.write(request(tiny_bundle, 2))
            assert len((await call.read()).probabilities) == 2
            await call.done_writing()
            await serving

    watched(play(), caplog)


def test_language_models_are_served_beside_each_other_and_drained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [write_tiny_llama(tmp_path / name, seed=seed, context=64) for seed, name in enumerate(("one", "two"))]
    models = tuple(str(folder) for folder in folders)
    config = CloudConfig(models=models, dtype="float32", width=4, listen="127.0.0.1:0", metrics=None)

    async def play() -> None:
        serving = asyncio.create_task(serve(config))
        async with grpc.aio.insecure_channel(await listening(serving, caplog)) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            infos = wire.unpack_service(await stub.Describe(pb.DescribeRequest())).models
            assert [(info.name, info.context, info.numerics) for info in infos] == [
                (name, 64, "float32/4") for name in ("one", "two")
            ]
            calls = [stub.Generate() for _ in infos]
            for info, call in zip(infos, calls, strict=True):
                opening = Opening(info.fingerprint, bytes(16), 0, (5, 6, 7), wire_session.checksum((5, 6, 7)))
                await call.write(wire_session.pack_opening(opening))
                await call.write(wire_session.pack_round(Round(3)))
                assert len((await call.read()).tokens) == 1
            os.kill(os.getpid(), signal.SIGTERM)
            for call in calls:
                assert (await call.read()).error.code == grpc.StatusCode.UNAVAILABLE.value[0]
                assert await call.read() is grpc.aio.EOF
            await serving

    watched(play(), caplog)
    assert caplog.messages[-1] == "drained"


def watched(play: Coroutine[Any, Any, None], caplog: pytest.LogCaptureFixture) -> None:
    """Run a play to its end, within 30 s, and keep what the service logs."""
    with caplog.at_level(logging.INFO, "isthmus.cloud"):
        asyncio.run(asyncio.wait_for(play, 30))


def tiny_model(folder: Path, seed: int) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(folder, seed=seed, context=64))


def test_handoffs_are_of_the_models_that_are_served(tmp_path: Path) -> None:
    one, two = (tiny_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    folders = [write_tiny_handoff(tmp_path / f"to-{model.name}", model) for model in (two, one)]
    found = open_handoffs(folders, [one, two])
    assert {name: [each.manifest.base for each in handoffs] for name, handoffs in found.items()} == {
        model.fingerprint: [model.fingerprint.hex()] for model in (one, two)
    }
    assert open_handoffs([], [one]) == {one.fingerprint: []}
    deeper = write_tiny_handoff(tmp_path / "deeper", one, depth=1, seed=1)
    assert len(open_handoffs([*folders, deeper], [one, two])[one.fingerprint]) == 2
    with pytest.raises(BundleError, match=f"belongs to the model {two.fingerprint.hex()[:12]}…, served are one"):
        open_handoffs(folders, [one])
    with pytest.raises(BundleError, match="served are none"):
        open_handoffs(folders, [])
    with pytest.raises(BundleError, match="this hand-off bundle of one is named twice"):
        open_handoffs([*folders, folders[1]], [one, two])
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_handoffs([tmp_path / "nothing"], [one])


def test_a_handoff_is_served_and_drained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tmp_path / "one", 0)
    handoff = HandoffBundle.open(write_tiny_handoff(tmp_path / "handoff", model), model)
    config = CloudConfig(
        models=(str(tmp_path / "one"),),
        handoffs=(tmp_path / "handoff",),
        dtype="float32",
        width=4,
        listen="127.0.0.1:0",
        metrics=None,
    )
    ones_MH = np.ones((4, model.config.hidden), np.float32)
    states = handoff.state_codec.encode(ones_MH[1:], ones_MH, 1)

    async def play() -> None:
        serving = asyncio.create_task(serve(config))
        async with grpc.aio.insecure_channel(await listening(serving, caplog)) as channel:
            stub = pb_grpc.IsthmusStub(channel)
            (info,) = wire.unpack_service(await stub.Describe(pb.DescribeRequest())).models
            assert info.handoffs == (handoff.fingerprint,)
            call = stub.Generate()
            opening = Opening(
                info.fingerprint,
                bytes(16),
                0,
                (),
                0,
                handoff=handoff.fingerprint,
                rate=1,
                context_rate=1,
                prefill_layers=1,
            )
            await call.write(wire_session.pack_opening(opening))
            await call.write(wire_session.pack_round(Round(0, (5, 6, 7), 1, tuple(states))))
            assert len((await call.read()).tokens) == 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await call.read()).error.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert await call.read() is grpc.aio.EOF
            await serving

    watched(play(), caplog)
    assert caplog.messages[-1] == "drained"
    assert any(
        f"hand-off of one behind layer {handoff.depth} {handoff.fingerprint.hex()[:12]}" in message
        for message in caplog.messages
    )
