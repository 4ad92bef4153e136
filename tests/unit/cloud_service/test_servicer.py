"""The servicer on a real gRPC server in this process, with a scripted `VisionService`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry

from isthmus.cloud_service import servicer as module
from isthmus.cloud_service.access import Access
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.service import LanguageService
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.cloud_service.servicer import Servicer, attach
from isthmus.models import errors
from isthmus.models.messages import BundleInfo, CloudReply, CloudRequest, Codec, Payload, TapInfo, TaskInfo
from isthmus.protos import limits, wire, wire_describe
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc

INFO = BundleInfo(bytes(range(32)), "fake", (TaskInfo("defect", 2), TaskInfo("colour", 2)), (TapInfo("light", 3),))
Status = grpc.StatusCode


class FakeVision:
    """Answers with the payload's first byte, or raises what the payload names in `failures`, once `gate` is open."""

    bundles = (INFO,)

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: dict[bytes, Exception] = {}
        self.inside = self.most_inside = self.seen = 0
        self.peers: set[str] = set()
        self.width = 1  # how many times each probability is repeated, which makes an answer large

    async def submit(self, request: CloudRequest, peer: str) -> CloudReply:
        self.seen += 1
        self.peers.add(peer)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await self.gate.wait()
            if (failure := self.failures.get(request.payload.data)) is not None:
                raise failure
            share = request.payload.data[0] / 255
            return CloudReply(tuple((share, 1 - share) * self.width for _ in request.tasks), 0.001, 0.002)
        finally:
            self.inside -= 1


class ServicerHarness:
    """A servicer with its metrics and a client's stub."""

    def __init__(self) -> None:
        self.vision, self.registry = FakeVision(), CollectorRegistry()
        metrics = CloudMetrics(self.registry, [INFO])
        self.queue = ByteBudget(1 << 20)
        self.servicer = Servicer(self.vision, LanguageService(), metrics, self.queue)
        self.stub: Any = None
        self.channel: Any = None
        self.target = ""

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def scenario(play: Callable[[ServicerHarness], Coroutine[Any, Any, None]]) -> ServicerHarness:
    """Run `play` against a server on a free port."""

    async def both() -> ServicerHarness:
        harness = ServicerHarness()
        server = grpc.aio.server(options=limits.server_options())
        attach(harness.servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            harness.target = f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(harness.target) as channel:
                harness.channel, harness.stub = channel, pb_grpc.IsthmusStub(channel)
                await asyncio.wait_for(play(harness), 30)
        finally:
            await server.stop(None)
        return harness

    return asyncio.run(both())


def request(request_id: int, data: bytes = b"\xff", tasks: tuple[int, ...] = (0,)) -> pb.InferRequest:
    payload = Payload(Codec.BOTTLENECK, 0, 0, data)
    return wire.pack_request(CloudRequest(request_id, INFO.fingerprint, 10.0, payload, tasks))


def spoilt(request_id: int, **fields: Any) -> pb.InferRequest:
    message = request(request_id)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_unary_answers_with_what_the_cloud_spent() -> None:
    async def play(harness: ServicerHarness) -> None:
        response = await harness.stub.Infer(request(7))
        assert response.request_id == 7
        assert wire.unpack_answer(response, [2]) == CloudReply(((1.0, 0.0),), 0.001, 0.002)

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_total", method="Infer", code="OK") == 1
    assert harness.count("isthmus_cloud_inflight_requests") == 0


def test_devices_are_told_apart_by_their_connections() -> None:
    async def play(harness: ServicerHarness) -> None:
        await harness.stub.Infer(request(1))
        async for _ in harness.stub.InferStream(iter([request(2), request(3)])):
            pass
        (peer,) = harness.vision.peers
        async with grpc.aio.insecure_channel(harness.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            await pb_grpc.IsthmusStub(channel).Infer(request(1))
        assert len(harness.vision.peers) == 2 and all("127.0.0.1:" in name for name in (peer, *harness.vision.peers))

    scenario(play)


def test_a_service_with_too_much_to_do_says_when_to_try_again() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.failures[b"\1"] = errors.Overloaded("the inputs before this one take 1200 ms", 1.2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await harness.stub.Infer(request(1, b"\1"))
        assert refused.value.code() is Status.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "1200") in tuple(refused.value.trailing_metadata() or ())
        async for response in harness.stub.InferStream(iter([request(1, b"\1")])):
            assert (response.error.code, response.error.retry_ms) == (Status.RESOURCE_EXHAUSTED.value[0], 1200)

    scenario(play)


def test_the_tasks_asked_for_are_answered_one_after_another() -> None:
    async def play(harness: ServicerHarness) -> None:
        both, second = request(1, b"\x33", (0, 1)), request(2, b"\xff", (1,))
        answers = {response.request_id: response async for response in harness.stub.InferStream(iter([both, second]))}
        first, other = wire.unpack_answer(answers[1], [2, 2]).probabilities
        assert first == other == pytest.approx((0.2, 0.8))
        assert wire.unpack_answer(answers[2], [2]).probabilities == ((1.0, 0.0),)

    scenario(play)


@pytest.mark.parametrize(
    ("failure", "code", "text"),
    [
        (errors.UnknownBundle("not held"), Status.NOT_FOUND, "not held"),
        (errors.PayloadCorrupt("does not decode"), Status.DATA_LOSS, "does not decode"),
        (errors.PayloadTooLarge("over the cap"), Status.OUT_OF_RANGE, "over the cap"),
        (errors.InvalidInput("no such rate"), Status.INVALID_ARGUMENT, "no such rate"),
        (errors.Overloaded("queue full"), Status.RESOURCE_EXHAUSTED, "queue full"),
        (errors.Draining("shutting down"), Status.UNAVAILABLE, "shutting down"),
        (errors.DeadlineExceeded("expired"), Status.DEADLINE_EXCEEDED, "expired"),
        (errors.ServiceError("weights in /srv/secret"), Status.INTERNAL, "the service failed on this input"),
        (KeyError("/srv/secret"), Status.INTERNAL, "the service failed on this input"),
    ],
)
def test_unary_errors_are_status_codes_without_internal_details(failure: Exception, code: Status, text: str) -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.failures[b"bad!"] = failure
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Infer(request(1, b"bad!"))
        assert (caught.value.code(), caught.value.details()) == (code, text)
        assert (await harness.stub.Infer(request(2))).request_id == 2

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_total", method="Infer", code=code.name) == 1
    assert harness.count("isthmus_cloud_requests_total", method="Infer", code="OK") == 1
    assert harness.count("isthmus_cloud_inflight_requests") == 0


def test_a_fault_of_the_service_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.failures[b"bad!"] = KeyError("what went wrong")
        with pytest.raises(grpc.aio.AioRpcError):
            await harness.stub.Infer(request(1, b"bad!"))

    with caplog.at_level(logging.ERROR, "isthmus.cloud"):
        scenario(play)
    assert "what went wrong" in caplog.text


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"wire_version": 1}, Status.FAILED_PRECONDITION, "version"),
        ({"payload": b"flipped"}, Status.DATA_LOSS, "checksum"),
        ({"bundle": 7}, Status.DATA_LOSS, "checksum"),
        ({"point": 1}, Status.DATA_LOSS, "checksum"),
        ({"tasks": 2}, Status.DATA_LOSS, "checksum"),
        ({"budget_ms": 0}, Status.INVALID_ARGUMENT, None),
        ({"codec": 99}, Status.INVALID_ARGUMENT, None),
    ],
)
def test_an_unreadable_request_never_reaches_the_vision_service(
    fields: dict[str, Any], code: Status, reason: str | None
) -> None:
    async def play(harness: ServicerHarness) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Infer(spoilt(1, **fields))
        assert caught.value.code() is code
        assert harness.vision.seen == 0

    harness = scenario(play)
    counted = {
        sample.labels["reason"]: sample.value
        for family in harness.registry.collect()
        for sample in family.samples
        if sample.name == "isthmus_cloud_decode_failures_total"
    }
    assert {name for name, value in counted.items() if value} == ({reason} if reason else set())


def test_a_stream_answers_each_input_and_errors_travel_in_responses() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.failures[b"bad!"] = errors.PayloadCorrupt("bad")
        messages = [request(1), request(2, b"bad!"), spoilt(3, wire_version=9), request(4, b"\x00")]
        answers = {response.request_id: response async for response in harness.stub.InferStream(iter(messages))}
        assert sorted(answers) == [1, 2, 3, 4]
        assert [answers[number].error.code for number in (1, 2, 3, 4)] == [
            0,
            Status.DATA_LOSS.value[0],
            Status.FAILED_PRECONDITION.value[0],
            0,
        ]
        assert list(answers[4].probabilities) == [0.0, 1.0]

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_total", method="InferStream", code="OK") == 2


def test_a_stream_is_read_only_up_to_its_limit_in_flight_and_all_requests_are_answered() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.gate.clear()
        count = limits.MAX_STREAM_INFLIGHT + 20
        call = harness.stub.InferStream(iter([request(number + 1) for number in range(count)]))
        await until(lambda: harness.vision.inside == limits.MAX_STREAM_INFLIGHT)
        await asyncio.sleep(0.05)
        assert harness.vision.seen == limits.MAX_STREAM_INFLIGHT
        harness.vision.gate.set()
        answered = [response.request_id async for response in call]
        assert sorted(answered) == list(range(1, count + 1))
        assert harness.vision.most_inside == limits.MAX_STREAM_INFLIGHT

    scenario(play)


def test_a_caller_that_disconnects_leaves_nothing_in_flight() -> None:
    async def play(harness: ServicerHarness) -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        harness.vision.gate.clear()
        call = harness.stub.InferStream(iter([request(1), request(2)]))
        await until(lambda: harness.vision.inside == 2)
        call.cancel()
        await until(lambda: harness.vision.inside == 0)
        await asyncio.wait_for(harness.servicer.drained(), 10)
        assert complaints == []

    assert scenario(play).count("isthmus_cloud_inflight_requests") == 0


def test_the_input_of_a_unary_caller_whose_deadline_passes_is_cancelled() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.gate.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Infer(request(1), timeout=0.2)
        assert caught.value.code() is Status.DEADLINE_EXCEEDED
        await until(lambda: harness.vision.inside == 0)

    assert scenario(play).count("isthmus_cloud_inflight_requests") == 0


def test_draining_notifies_streams_and_answers_outstanding_requests() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.gate.clear()
        call = harness.stub.InferStream()
        await call.write(request(1))
        await until(lambda: harness.vision.inside == 1)
        harness.servicer.drain()
        notice = await call.read()
        assert (notice.request_id, notice.error.code) == (0, Status.UNAVAILABLE.value[0])
        drained = asyncio.create_task(harness.servicer.drained())
        await call.done_writing()
        await asyncio.sleep(0.05)
        assert not drained.done()
        harness.vision.gate.set()
        answer = await call.read()
        assert (answer.request_id, list(answer.probabilities)) == (1, [1.0, 0.0])
        assert await call.read() is grpc.aio.EOF
        await drained

    scenario(play)


def test_describe_lists_bundles_and_accepts_padding_up_to_its_cap() -> None:
    async def play(harness: ServicerHarness) -> None:
        response = await harness.stub.Describe(pb.DescribeRequest(padding=bytes(limits.MAX_PROBE_BYTES)))
        assert wire_describe.unpack_service(response).bundles == (INFO,)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Describe(pb.DescribeRequest(padding=bytes(limits.MAX_PROBE_BYTES + 1)))
        assert caught.value.code() is Status.INVALID_ARGUMENT
        assert str(limits.MAX_PROBE_BYTES) in caught.value.details()

    harness = scenario(play)
    codes = ("OK", "INVALID_ARGUMENT")
    assert [harness.count("isthmus_cloud_requests_total", method="Describe", code=code) for code in codes] == [1, 1]


def test_what_came_before_undecodable_bytes_is_answered_and_the_fault_is_named() -> None:
    async def play(harness: ServicerHarness) -> None:
        method = harness.channel.stream_stream(
            "/isthmus.v1.Isthmus/InferStream",
            request_serializer=bytes,
            response_deserializer=pb.InferResponse.FromString,
        )
        call = method(iter([request(1).SerializeToString(), request(2).SerializeToString(), b"\xff" * 64]))
        answers = []
        with pytest.raises(grpc.aio.AioRpcError, match="not a message") as caught:
            async for response in call:
                answers.append(response.request_id)
        assert sorted(answers) == [1, 2]
        assert caught.value.code() is Status.INVALID_ARGUMENT

    scenario(play)


LARGE = 8192  # repetitions: an answer takes 64 KiB


def test_answers_that_a_device_does_not_read_are_bounded_and_counted() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.width = LARGE
        harness.queue.limit_bytes = 1 << 30
        count = 1000
        call = harness.stub.InferStream(iter([request(number + 1) for number in range(count)]))
        seen = -1
        while seen < harness.vision.seen:
            seen = harness.vision.seen
            await asyncio.sleep(0.3)
        assert limits.MAX_STREAM_INFLIGHT <= seen < count / 2  # the others wait in the device
        assert 0 < harness.queue.held_bytes <= limits.MAX_STREAM_INFLIGHT * (LARGE * 8 + 64)
        call.cancel()
        await asyncio.wait_for(harness.servicer.drained(), 10)
        assert harness.queue.held_bytes == 0

    scenario(play)


def test_a_device_that_does_not_read_is_cut_off_after_a_while() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.width = LARGE
        harness.queue.limit_bytes = 1 << 30
        harness.stub.InferStream(iter([request(number + 1) for number in range(1000)]))
        await until(lambda: harness.queue.held_bytes > LARGE * 8 * limits.MAX_STREAM_INFLIGHT)
        harness.servicer._calls.end_idle(1e-6)
        await asyncio.wait_for(harness.servicer.drained(), 10)
        assert harness.queue.held_bytes == 0

    scenario(play)


def test_answers_and_payloads_that_do_not_fit_into_the_budget_are_refused() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.width = LARGE
        harness.queue.limit_bytes = LARGE * 8 - 1
        messages = [request(1), request(2, bytes(LARGE * 8))]
        answers = [response async for response in harness.stub.InferStream(iter(messages))]
        assert [response.error.code for response in answers] == [Status.RESOURCE_EXHAUSTED.value[0]] * 2
        assert {response.request_id for response in answers} == {1, 2}
        assert harness.queue.held_bytes == 0

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_rejected_total", reason="queue") == 2


def test_an_idle_stream_is_ended_and_one_with_a_request_is_not() -> None:
    async def play(harness: ServicerHarness) -> None:
        harness.vision.gate.clear()
        idle, busy = harness.stub.InferStream(), harness.stub.InferStream()
        await busy.write(request(1))
        await until(lambda: harness.vision.inside == 1 and len(harness.servicer._calls) == 2)
        harness.servicer._calls.end_idle(1e-6)
        assert await idle.read() is grpc.aio.EOF
        assert await idle.code() is Status.OK
        harness.vision.gate.set()
        assert (await busy.read()).request_id == 1
        await busy.done_writing()

    scenario(play)


def test_with_too_many_calls_open_the_next_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 1)

    async def play(harness: ServicerHarness) -> None:
        harness.vision.gate.clear()
        busy = harness.stub.InferStream()
        await busy.write(request(1))
        await until(lambda: harness.vision.inside == 1)
        for call in (harness.stub.Infer(request(2)), harness.stub.InferStream(), harness.stub.Generate()):
            assert await call.code() is Status.RESOURCE_EXHAUSTED
            assert "1 calls are open" in await call.details()
        await harness.stub.Describe(pb.DescribeRequest())
        harness.vision.gate.set()
        assert (await busy.read()).request_id == 1

    harness = scenario(play)
    assert harness.count("isthmus_cloud_requests_rejected_total", reason="calls") == 3


def test_devices_with_certificates_are_told_apart_by_their_names() -> None:
    """However many connections each of them opens."""
    authority = trustme.CA()
    roots = authority.cert_pem.bytes()
    own = authority.issue_cert("localhost")

    async def play() -> set[str]:
        harness = ServicerHarness()
        harness.servicer.access = Access(by_certificate=True)
        server = grpc.aio.server(options=limits.server_options())
        attach(harness.servicer, server)
        pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair], roots, True))
        await server.start()
        for name in ("camera-1.example", "camera-2.example", "camera-1.example"):
            device = authority.issue_cert(name)
            credentials = grpc.ssl_channel_credentials(
                roots, device.private_key_pem.bytes(), device.cert_chain_pems[0].bytes()
            )
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                await pb_grpc.IsthmusStub(channel).Infer(request(1))
        await server.stop(None)
        return harness.vision.peers

    assert asyncio.run(play()) == {"camera-1.example", "camera-2.example"}
