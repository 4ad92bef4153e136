"""The whole service in this process, over gRPC: loaded, served, drained by a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.cloud_service.app import serve
from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.servicer import Servicer
from isthmus.models.errors import BundleError
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.messages import CloudRequest, Codec, Opening, Payload, Round
from isthmus.models.vision.bundle import Bundle
from isthmus.protos import wire, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import tiny_model


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        asyncio.run(serve(CloudConfig(bundles=(tmp_path,), listen="127.0.0.1:0", metrics=None)))


async def listening(serving: asyncio.Task[None], caplog: pytest.LogCaptureFixture) -> str:
    """The service's address, from its log."""
    while not (bound := [str(record.args[1]) for record in caplog.records if record.msg.startswith("serving")]):  # type: ignore[index]
        if serving.done():
            serving.result()
        await asyncio.sleep(0.01)
    return bound[0].partition(",")[0]


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
            infos = wire_describe.unpack_service(await stub.Describe(pb.DescribeRequest())).models
            assert [(info.name, info.context, info.precision) for info in infos] == [
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
            (info,) = wire_describe.unpack_service(await stub.Describe(pb.DescribeRequest())).models
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
        f"handoff of one after layer {handoff.depth} {handoff.fingerprint.hex()[:12]}" in message
        for message in caplog.messages
    )
