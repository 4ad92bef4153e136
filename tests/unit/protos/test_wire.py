from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models import errors
from isthmus.models.errors import (
    DeadlineExceeded,
    Draining,
    InvalidInput,
    InvalidReply,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    UnknownBundle,
    UnsupportedVersion,
)
from isthmus.models.messages import (
    BundleInfo,
    CloudReply,
    CloudRequest,
    Codec,
    Payload,
    ServiceInfo,
    TapInfo,
    TaskInfo,
)
from isthmus.models.vision.architecture import TapArchitecture
from isthmus.models.vision.manifest import Manifest
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

FINGERPRINT = bytes(range(32))
REQUEST = CloudRequest(300, FINGERPRINT, 1.5, Payload(Codec.BOTTLENECK, 1, 2, b"payload bytes"), tasks=(0, 2))
ANSWER = CloudReply(((0.25, 0.75), (0.5, 0.375, 0.125)), queue_s=0.0015, compute_s=0.02)
BUNDLE = BundleInfo(
    FINGERPRINT, "elpv", (TaskInfo("defect", 2), TaskInfo("cell_type", 2)), (TapInfo("light", 6), TapInfo("deep", 4))
)
SERVICE = ServiceInfo("0.1.0", limits.WIRE_VERSION, (BUNDLE,))

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def test_infer_request_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("infer_request_v3.bin", wire.pack_request(REQUEST).SerializeToString(deterministic=True))


def test_infer_response_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("infer_response_v3.bin", wire.pack_answer(300, ANSWER).SerializeToString(deterministic=True))


def test_infer_error_is_golden(golden: Callable[[str, bytes], None]) -> None:
    message = wire.pack_error(300, UnknownBundle("no such bundle"))
    golden("infer_error_v3.bin", message.SerializeToString(deterministic=True))


indices = st.integers(0, limits.MAX_RATES - 1)
payloads = st.builds(
    Payload, st.just(Codec.BOTTLENECK), st.integers(0, 1000), indices, st.binary(max_size=200)
) | st.builds(Payload, st.just(Codec.IMAGE), st.just(0), st.just(0), st.binary(max_size=200))
requests = st.builds(
    CloudRequest,
    request_id=st.integers(1, (1 << 32) - 1),
    fingerprint=st.binary(min_size=32, max_size=32),
    budget_s=st.floats(0.001, 600),
    payload=payloads,
    tasks=st.sets(st.integers(0, limits.MAX_TASKS - 1), min_size=1).map(lambda tasks: tuple(sorted(tasks))),
)


def sent(message: M) -> M:
    """What arrives at the other end."""
    return type(message).FromString(message.SerializeToString())


@given(request=requests)
def test_a_request_arrives_as_it_was_sent(request: CloudRequest) -> None:
    arrived = wire.unpack_request(sent(wire.pack_request(request)))
    assert (arrived.request_id, arrived.payload) == (request.request_id, request.payload)
    assert arrived.tasks == request.tasks
    assert arrived.fingerprint == request.fingerprint[: limits.BUNDLE_ID_BYTES]
    assert request.budget_s - 0.001001 <= arrived.budget_s <= request.budget_s + 1e-9


@given(
    weights=st.lists(st.lists(st.integers(1, 1000), min_size=2, max_size=20), min_size=1, max_size=limits.MAX_TASKS),
    queue_us=st.integers(0, wire.UINT32),
    compute_us=st.integers(0, wire.UINT32),
)
def test_an_answer_arrives_as_it_was_sent(weights: list[list[int]], queue_us: int, compute_us: int) -> None:
    probabilities = tuple(tuple((np.array(w) / sum(w)).astype(np.float32).tolist()) for w in weights)
    answer = CloudReply(probabilities, queue_us / 1e6, compute_us / 1e6)
    assert wire.unpack_answer(sent(wire.pack_answer(7, answer)), [len(w) for w in weights]) == answer


def leaves(kind: type[IsthmusError]) -> set[type[IsthmusError]]:
    below: list[type[IsthmusError]] = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


@pytest.mark.parametrize("kind", sorted(leaves(IsthmusError), key=lambda kind: kind.__name__))
def test_an_error_arrives_as_an_error(kind: type[IsthmusError]) -> None:
    with pytest.raises(IsthmusError) as caught:
        wire.unpack_answer(sent(wire.pack_error(7, kind("what was wrong"))), [2])
    same_or_known = {
        errors.BundleError: errors.ServiceError,
        errors.Draining: errors.LinkDown,
        errors.EngineDown: errors.LinkDown,
        errors.EngineFault: errors.ServiceError,
        errors.AgentClosed: errors.InvalidInput,  # these are raised on the device only
        errors.AnswerCancelled: errors.InvalidInput,
        errors.ContextExceeded: errors.InvalidInput,
        errors.InvalidGrammar: errors.InvalidInput,
        errors.InvalidReply: errors.ServiceError,
        errors.OverBudget: errors.InvalidInput,
    }
    assert type(caught.value) is same_or_known.get(kind, kind)


@pytest.mark.parametrize(("retry_s", "expected_s"), [(0.0, 0.0), (1.25, 1.25), (1e9, 600.0)])
def test_an_overloaded_service_s_hint_arrives(retry_s: float, expected_s: float) -> None:
    with pytest.raises(Overloaded) as refused:
        wire.unpack_answer(sent(wire.pack_error(7, Overloaded("full", retry_s))), [2])
    assert refused.value.retry_s == expected_s


@pytest.mark.parametrize("budget_s", [0.0009, 0.0, -1.0, float("nan"), float("-inf")])
def test_a_request_without_time_is_not_sent(budget_s: float) -> None:
    with pytest.raises(DeadlineExceeded, match="less than a millisecond"):
        wire.pack_request(CloudRequest(1, FINGERPRINT, budget_s, REQUEST.payload))


@pytest.mark.parametrize("budget_s", [600.1, 1e12, float("inf")])
def test_a_budget_is_sent_as_at_most_the_limit(budget_s: float) -> None:
    message = wire.pack_request(CloudRequest(1, FINGERPRINT, budget_s, REQUEST.payload))
    assert message.budget_ms == limits.MAX_BUDGET_MS


@pytest.mark.parametrize("tasks", [(), (-1,), (0, limits.MAX_TASKS)])
def test_a_request_for_tasks_that_no_bundle_has_is_not_sent(tasks: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="tasks"):
        wire.pack_request(dataclasses.replace(REQUEST, tasks=tasks))


@pytest.mark.parametrize(("tap", "rate"), [(-1, 0), (0, -1), (0, limits.MAX_RATES)])
def test_a_point_that_no_bundle_has_is_not_sent(tap: int, rate: int) -> None:
    with pytest.raises(InvalidInput, match=f"tap {tap}, rate {rate}"):
        wire.pack_request(dataclasses.replace(REQUEST, payload=Payload(Codec.BOTTLENECK, tap, rate, b"x")))


def test_points_and_tasks_of_a_manifest_fit_into_their_fields() -> None:
    fields = TapArchitecture.model_fields["rates"], Manifest.model_fields["taps"], Manifest.model_fields["tasks"]
    most = [next(rule.le if hasattr(rule, "le") else rule.max_length for rule in f.metadata[::-1]) for f in fields]
    assert most == [limits.MAX_RATES, limits.MAX_TAPS, limits.MAX_TASKS]


@pytest.mark.parametrize(
    ("tasks", "bits"), [((0,), 0), ((1,), 2), ((0, 1), 3), ((1, 0), 3), ((7,), 128), ((0, 1, 2, 3, 4, 5, 6, 7), 255)]
)
def test_tasks_are_bits_and_the_first_alone_costs_nothing(tasks: tuple[int, ...], bits: int) -> None:
    message = wire.pack_request(dataclasses.replace(REQUEST, tasks=tasks))
    assert message.tasks == bits
    assert wire.unpack_request(message).tasks == tuple(sorted(tasks))


def test_the_first_task_may_be_spelt_out() -> None:
    message = wire.pack_request(dataclasses.replace(REQUEST, tasks=(0,)))
    message.tasks = 1
    message.crc32 = wire.checksum(message)
    assert wire.unpack_request(message).tasks == (0,)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[IsthmusError], str]] = {
    "no version": ({"wire_version": 0}, UnsupportedVersion, "wire version 0, this service reads 3"),
    "version before": ({"wire_version": 2}, UnsupportedVersion, "wire version 2, this service reads 3"),
    "next version": ({"wire_version": 4}, UnsupportedVersion, "wire version 4"),
    "no bundle": ({"bundle": 0}, PayloadCorrupt, "CRC-32"),
    "other bundle": ({"bundle": 1}, PayloadCorrupt, "CRC-32"),
    "no request id": ({"request_id": 0}, InvalidInput, "request_id is 0"),
    "request id of another": ({"request_id": 3}, PayloadCorrupt, "CRC-32"),
    "no budget": ({"budget_ms": 0}, InvalidInput, "budget_ms is 0, expected 1 to 600000"),
    "wild budget": ({"budget_ms": 600_001}, InvalidInput, "budget_ms is 600001"),
    "no codec": ({"codec": 0}, InvalidInput, "codec 0 is unknown, expected one of [1, 2]"),
    "unknown codec": ({"codec": 77}, InvalidInput, "codec 77 is unknown"),
    "negative codec": ({"codec": -1}, InvalidInput, "codec -1 is unknown"),
    "image at a point": ({"codec": 2}, InvalidInput, "point is 66, expected 0 for a whole image"),
    "other rate": ({"point": 67}, PayloadCorrupt, "CRC-32"),
    "other tap": ({"point": 2}, PayloadCorrupt, "CRC-32"),
    "other tasks": ({"tasks": 4}, PayloadCorrupt, "CRC-32"),
    "no tasks": ({"tasks": 0}, PayloadCorrupt, "CRC-32"),
    "other payload": ({"payload": b"payload bytez"}, PayloadCorrupt, "CRC-32"),
    "empty payload": ({"payload": b""}, PayloadCorrupt, "CRC-32"),
    "no checksum": ({"crc32": 0}, PayloadCorrupt, "the request says 00000000"),
    "payload over the cap": ({"payload": bytes(limits.MAX_IMAGE_BYTES + 1)}, PayloadTooLarge, "4194305 bytes"),
}


@pytest.mark.parametrize(("fields", "kind", "words"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_field_of_a_request_is_refused_by_name(
    fields: dict[str, Any], kind: type[IsthmusError], words: str
) -> None:
    message = wire.pack_request(REQUEST)
    for name, value in fields.items():
        setattr(message, name, value)
    with pytest.raises(kind) as caught:
        wire.unpack_request(message)
    assert words in str(caught.value)


def test_any_bits_of_tasks_are_read_for_the_bundle_to_judge() -> None:
    message = wire.pack_request(REQUEST)
    message.tasks, message.point = wire.UINT32, wire.UINT32
    message.crc32 = wire.checksum(message)
    arrived = wire.unpack_request(message)
    assert arrived.tasks == tuple(range(32))
    assert (arrived.payload.tap, arrived.payload.rate) == (wire.UINT32 // 64, 63)


BAD_ANSWERS: dict[str, tuple[list[float], str]] = {
    "no probabilities": ([], "0 probabilities, expected 5"),
    "of the first task alone": ([0.25, 0.75], "2 probabilities, expected 5"),
    "too many": ([0.5, 0.5, 0.2, 0.3, 0.5, 0.0], "6 probabilities, expected 5"),
    "not a number": ([float("nan"), 0.5, 0.2, 0.3, 0.5], "not probabilities"),
    "infinite": ([0.5, 0.5, 0.2, float("inf"), 0.5], "not probabilities"),
    "negative": ([-0.5, 1.5, 0.2, 0.3, 0.5], "not probabilities"),
    "sum of two": ([1.0, 1.0, 0.2, 0.3, 0.5], "not probabilities"),
    "second task without a sum": ([0.5, 0.5, 0.0, 0.0, 0.0], "not probabilities"),
    "one sum over both tasks": ([0.2, 0.3, 0.1, 0.2, 0.2], "not probabilities"),
    "sums of one across the border": ([0.5, 0.25, 0.25, 0.5, 0.5], "not probabilities"),
}


@pytest.mark.parametrize(("probabilities", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_an_answer_that_cannot_be_true_is_refused(probabilities: list[float], words: str) -> None:
    with pytest.raises(InvalidReply, match=words):
        wire.unpack_answer(with_checksum(pb.InferResponse(probabilities=probabilities)), [2, 3])


def test_an_error_of_code_ok_is_the_services_fault() -> None:
    with pytest.raises(errors.ServiceError):
        wire.unpack_answer(with_checksum(pb.InferResponse(error=pb.Error(), probabilities=[0.5, 0.5])), [2])


def with_checksum(message: pb.InferResponse) -> pb.InferResponse:
    message.crc32 = wire.answer_checksum(message)
    return message


@given(st.sampled_from([wire.pack_answer(300, ANSWER), wire.pack_error(300, Overloaded("full", 1.5))]), st.data())
def test_no_flipped_bit_of_an_answer_is_believed(message: pb.InferResponse, data: st.DataObject) -> None:
    flipped = bytearray(message.SerializeToString())
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(DecodeError), pytest.raises(InvalidReply, match="CRC-32"):
        wire.unpack_answer(pb.InferResponse.FromString(bytes(flipped)), [2, 3])


def test_an_answer_under_another_id_is_refused() -> None:
    message = wire.pack_answer(300, ANSWER)
    message.request_id = 301
    with pytest.raises(InvalidReply, match="CRC-32 of the answer is"):
        wire.unpack_answer(message, [2, 3])


def test_only_a_whole_drain_notice_is_one() -> None:
    notice = wire.pack_error(0, Draining("bye"))
    assert wire.is_drain_notice(sent(notice))
    assert not wire.is_drain_notice(wire.pack_error(7, Draining("bye")))
    assert not wire.is_drain_notice(wire.pack_error(0, InvalidInput("what?")))
    notice.crc32 ^= 1
    assert not wire.is_drain_notice(notice)


@pytest.mark.parametrize("payload", [REQUEST.payload, Payload(Codec.IMAGE, 0, 0, b"\xff\xd8\xff" + bytes(20))])
def test_no_flipped_bit_yields_another_payload(payload: Payload) -> None:
    request = CloudRequest(300, FINGERPRINT, 1.5, payload)
    good = wire.pack_request(request).SerializeToString()
    accepted = 0
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        try:
            arrived = wire.unpack_request(pb.InferRequest.FromString(bytes(data)))
        except (DecodeError, IsthmusError):
            continue
        accepted += 1  # of request id or budget
        assert (arrived.payload, arrived.fingerprint) == (payload, FINGERPRINT[:8])
    assert accepted < 40


ALL_BUT_ONE = tuple(range(limits.MAX_TASKS - 1))


@pytest.mark.parametrize(
    ("tap", "tasks", "payload_bytes", "framing"),
    [(0, (0,), 127, 29), (1, (0,), 127, 29), (1, (0, 1), 127, 31), (1, ALL_BUT_ONE, 4096, 32)],
)
def test_framing_stays_within_its_limit_at_the_largest_usual_values(
    tap: int, tasks: tuple[int, ...], payload_bytes: int, framing: int
) -> None:
    payload = Payload(Codec.BOTTLENECK, tap, limits.MAX_RATES - 1, bytes(payload_bytes))
    message = wire.pack_request(CloudRequest(limits.MAX_REQUEST_ID, FINGERPRINT, 16.0, payload, tasks))
    assert message.ByteSize() - payload_bytes == framing
    assert framing <= limits.MAX_FRAMING_BYTES


def test_the_checksum_is_the_crc_that_the_contract_describes() -> None:
    covered = b"\x2c\1\0\0" + FINGERPRINT[:8] + b"\1\0\0\0" + b"\x42\0\0\0" + b"\5\0\0\0" + b"payload bytes"
    assert wire.pack_request(REQUEST).crc32 == zlib.crc32(covered)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, 0), (-1.0, 0), (1e-6, 1), (0.5e-7, 0), (1.5, 1_500_000), (1e9, wire.UINT32)]
)
def test_seconds_become_microseconds_that_fit(seconds: float, expected: int) -> None:
    assert wire.microseconds(seconds) == expected
