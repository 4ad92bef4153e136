"""A hostile peer at the door: each bad message is refused with a clear status while other requests go on."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.models.messages import CloudRequest, Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import CloudProcess

Status = grpc.StatusCode


@pytest.fixture
def good(tiny_bundle: Bundle) -> pb.InferRequest:
    codec = tiny_bundle.codec(1)
    rng = np.random.default_rng(0)
    integers_CHW = codec.quantise(rng.normal(size=codec.shape_CHW).astype(np.float32), 1)
    payload = Payload(Codec.BOTTLENECK, 1, 1, codec.encode(integers_CHW, 1))
    return wire.pack_request(CloudRequest(1, tiny_bundle.fingerprint, 10.0, payload))


@pytest.fixture
def stub(cloud: CloudProcess) -> Iterator[pb_grpc.IsthmusStub]:
    options = [("grpc.max_send_message_length", 64 << 20)]
    with grpc.insecure_channel(cloud.target, options) as channel:
        yield pb_grpc.IsthmusStub(channel)  # type: ignore[no-untyped-call]


def resealed(message: pb.InferRequest) -> pb.InferRequest:
    """The checksum made true again: what a liar sends, not a bad link."""
    message.crc32 = wire.checksum(message)
    return message


def truncated(message: pb.InferRequest) -> pb.InferRequest:
    message.payload = message.payload[:-4]
    return message


def bit_flipped(message: pb.InferRequest) -> pb.InferRequest:
    message.payload = bytes([message.payload[0] ^ 1]) + message.payload[1:]
    return message


def oversized(message: pb.InferRequest) -> pb.InferRequest:
    message.payload = bytes(limits.MAX_MESSAGE_BYTES + 1)
    return message


def over_the_bundles_cap(message: pb.InferRequest) -> pb.InferRequest:
    message.payload = b"\x01" * 8192
    return resealed(message)


def wrong_version(message: pb.InferRequest) -> pb.InferRequest:
    message.wire_version += 1
    return message


def wrong_bundle(message: pb.InferRequest) -> pb.InferRequest:
    message.bundle = 0
    return resealed(message)


def wrong_rate(message: pb.InferRequest) -> pb.InferRequest:
    message.point = limits.MAX_RATES + 2
    return resealed(message)


def wrong_tap(message: pb.InferRequest) -> pb.InferRequest:
    message.point = 7 * limits.MAX_RATES
    return resealed(message)


def wild_point(message: pb.InferRequest) -> pb.InferRequest:
    message.point = wire.UINT32
    return resealed(message)


def other_tap(message: pb.InferRequest) -> pb.InferRequest:
    """A payload under another tap's tables."""
    message.point = 1
    return resealed(message)


def wrong_task(message: pb.InferRequest) -> pb.InferRequest:
    message.tasks = 0b101
    return resealed(message)


def every_task(message: pb.InferRequest) -> pb.InferRequest:
    message.tasks = wire.UINT32
    return resealed(message)


def unsealed_task(message: pb.InferRequest) -> pb.InferRequest:
    message.tasks = 0b10
    return message


def image_at_a_point(message: pb.InferRequest) -> pb.InferRequest:
    message.codec = pb.CODEC_IMAGE
    return resealed(message)


def lying_truncation(message: pb.InferRequest) -> pb.InferRequest:
    return resealed(truncated(message))


def noise(message: pb.InferRequest) -> pb.InferRequest:
    message.payload = np.random.default_rng(1).bytes(400)
    return resealed(message)


def not_an_image(message: pb.InferRequest) -> pb.InferRequest:
    message.codec, message.point = pb.CODEC_IMAGE, 0
    return resealed(message)


def no_codec(message: pb.InferRequest) -> pb.InferRequest:
    message.codec = pb.CODEC_UNSPECIFIED
    return message


def no_time(message: pb.InferRequest) -> pb.InferRequest:
    message.budget_ms = 0
    return message


CASES = [
    (truncated, Status.DATA_LOSS, "CRC-32"),
    (bit_flipped, Status.DATA_LOSS, "CRC-32"),
    (oversized, Status.RESOURCE_EXHAUSTED, "larger than max"),
    (over_the_bundles_cap, Status.OUT_OF_RANGE, "cap"),
    (wrong_version, Status.FAILED_PRECONDITION, "wire version 4, this service reads 3"),
    (wrong_bundle, Status.NOT_FOUND, "0000000000000000"),
    (wrong_rate, Status.INVALID_ARGUMENT, "rate 2 does not exist, the bundle has rates 0 to 1"),
    (wrong_tap, Status.INVALID_ARGUMENT, "tap 7 does not exist, the bundle has 0 light, 1 deep"),
    (wild_point, Status.INVALID_ARGUMENT, "tap 67108863 does not exist"),
    (other_tap, Status.DATA_LOSS, "decode"),
    (wrong_task, Status.INVALID_ARGUMENT, "task 2 does not exist, the bundle has 0 defect, 1 colour"),
    (every_task, Status.INVALID_ARGUMENT, "task 2 does not exist"),
    (unsealed_task, Status.DATA_LOSS, "CRC-32"),
    (image_at_a_point, Status.INVALID_ARGUMENT, "point is 65, expected 0 for a whole image"),
    (lying_truncation, Status.DATA_LOSS, "do not decode"),
    (noise, Status.DATA_LOSS, "decode"),
    (not_an_image, Status.INVALID_ARGUMENT, "not a readable"),
    (no_codec, Status.INVALID_ARGUMENT, "codec 0"),
    (no_time, Status.INVALID_ARGUMENT, "budget_ms"),
]


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refused_with_a_clear_status(
    stub: pb_grpc.IsthmusStub,
    good: pb.InferRequest,
    spoil: Callable[[pb.InferRequest], pb.InferRequest],
    code: Status,
    words: str,
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Infer(spoil(good), timeout=10)
    assert caught.value.code() is code
    details = caught.value.details() or ""
    assert (
        words in details
        and "\n" not in details
        and "Traceback" not in details
        and "/" not in details.replace("CRC/", "")
    )


def test_one_bad_message_of_a_stream_harms_no_other(stub: pb_grpc.IsthmusStub, good: pb.InferRequest) -> None:
    messages = []
    for request_id, spoil in enumerate([None, truncated, None, wrong_version, not_an_image, None, noise], start=1):
        message = pb.InferRequest()
        message.CopyFrom(good)
        message.request_id = request_id
        message = spoil(resealed(message)) if spoil else resealed(message)
        messages.append(message)
    answers = {answer.request_id: answer for answer in stub.InferStream(iter(messages), timeout=20)}
    assert sorted(answers) == [1, 2, 3, 4, 5, 6, 7]
    refused = {number for number, answer in answers.items() if answer.HasField("error")}
    assert refused == {2, 4, 5, 7}
    assert answers[1].probabilities == pytest.approx(answers[6].probabilities, abs=1e-5)


def test_others_go_on_while_a_peer_attacks(
    cloud: CloudProcess,
    stub: pb_grpc.IsthmusStub,
    good: pb.InferRequest,
    new_agent: Callable[..., EdgeAgent],
    photo: Image.Image,
) -> None:
    stop = threading.Event()
    attacks = 0

    def attack() -> None:
        nonlocal attacks
        while not stop.is_set():
            for spoil, _, _ in CASES:
                message = pb.InferRequest()
                message.CopyFrom(good)
                with pytest.raises(grpc.RpcError):
                    stub.Infer(spoil(message), timeout=10)
                attacks += 1

    attacker = threading.Thread(target=attack)
    attacker.start()
    agent = new_agent(cloud.target, mode="split", deadline_s=10.0)
    answers = [agent.infer(photo, tap="deep", rate=1) for _ in range(30)]
    stop.set()
    attacker.join()
    assert attacks >= len(CASES)
    assert all(answer.route == "split" for answer in answers)
    assert len({answer.probabilities for answer in answers}) == 1


def test_bytes_that_are_no_grpc_at_all(cloud: CloudProcess, stub: pb_grpc.IsthmusStub, good: pb.InferRequest) -> None:
    for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(512)):
        with socket.create_connection(("127.0.0.1", cloud.port)) as raw:
            raw.sendall(junk)
    assert len(stub.Infer(good, timeout=10).probabilities) == 2


def test_a_large_probe_is_refused(stub: pb_grpc.IsthmusStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Describe(pb.DescribeRequest(padding=bytes(limits.MAX_PROBE_BYTES + 1)), timeout=10)
    assert caught.value.code() is Status.INVALID_ARGUMENT
