from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from models import errors
from models.errors import (
    DeadlineExceeded,
    InvalidInput,
    IsthmusError,
    PayloadCorrupt,
    PayloadTooLarge,
    UnknownBundle,
    UnsupportedVersion,
)
from models.language.session import ModelInfo
from models.types import BundleInfo, CloudAnswer, CloudRequest, Codec, Payload, ServiceInfo
from protos import limits, wire
from protos.isthmus.v1 import isthmus_pb2 as pb

FINGERPRINT = bytes(range(32))
REQUEST = CloudRequest(300, FINGERPRINT, 1.5, Payload(Codec.FACTORIZED, 2, b"payload bytes"))
ANSWER = CloudAnswer((0.25, 0.75), queue_s=0.0015, compute_s=0.02)
SERVICE = ServiceInfo("0.1.0", limits.WIRE_VERSION, (BundleInfo(FINGERPRINT, "elpv", "classification", 2, 4),))

M = TypeVar("M", bound=Message)


def test_infer_request_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("infer_request_v1.bin", wire.pack_request(REQUEST).SerializeToString(deterministic=True))


def test_infer_response_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("infer_response_v1.bin", wire.pack_answer(300, ANSWER).SerializeToString(deterministic=True))


def test_infer_error_is_golden(golden: Callable[[str, bytes], None]) -> None:
    message = wire.pack_error(300, UnknownBundle("no such bundle"))
    golden("infer_error_v1.bin", message.SerializeToString(deterministic=True))


def test_describe_response_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("describe_response_v1.bin", wire.pack_service(SERVICE).SerializeToString(deterministic=True))


def test_describe_response_with_a_language_model_is_golden(golden: Callable[[str, bytes], None]) -> None:
    model = ModelInfo(FINGERPRINT, "SmolLM2", 49_152, 8192, "bfloat16/16")
    message = wire.pack_service(dataclasses.replace(SERVICE, models=(model,)))
    golden("describe_models_v1.bin", message.SerializeToString(deterministic=True))


def test_describe_request_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("describe_request_v1.bin", pb.DescribeRequest(padding=bytes(3)).SerializeToString(deterministic=True))


payloads = st.builds(
    Payload, st.just(Codec.FACTORIZED), st.integers(0, (1 << 32) - 1), st.binary(max_size=200)
) | st.builds(Payload, st.just(Codec.IMAGE), st.just(0), st.binary(max_size=200))
requests = st.builds(
    CloudRequest,
    request_id=st.integers(1, (1 << 32) - 1),
    fingerprint=st.binary(min_size=32, max_size=32),
    budget_s=st.floats(0.001, 600),
    payload=payloads,
)


def sent(message: M) -> M:
    """What arrives at the other end."""
    return type(message).FromString(message.SerializeToString())


@given(request=requests)
def test_a_request_arrives_as_it_was_sent(request: CloudRequest) -> None:
    arrived = wire.unpack_request(sent(wire.pack_request(request)))
    assert (arrived.request_id, arrived.payload) == (request.request_id, request.payload)
    assert arrived.fingerprint == request.fingerprint[: limits.BUNDLE_ID_BYTES]
    assert request.budget_s - 0.001001 <= arrived.budget_s <= request.budget_s + 1e-9


@given(
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=20),
    queue_us=st.integers(0, wire.UINT32),
    compute_us=st.integers(0, wire.UINT32),
)
def test_an_answer_arrives_as_it_was_sent(weights: list[int], queue_us: int, compute_us: int) -> None:
    probabilities = tuple((np.array(weights) / sum(weights)).astype(np.float32).tolist())
    answer = CloudAnswer(probabilities, queue_us / 1e6, compute_us / 1e6)
    assert wire.unpack_answer(sent(wire.pack_answer(7, answer)), len(weights)) == answer


@given(
    version=st.text(),
    bundles=st.lists(
        st.builds(
            BundleInfo,
            fingerprint=st.binary(min_size=32, max_size=32),
            name=st.text(),
            task=st.text(),
            labels=st.integers(1, limits.MAX_LABELS),
            rates=st.integers(1, 64),
        ),
        max_size=3,
    ),
    models=st.lists(
        st.builds(
            ModelInfo,
            fingerprint=st.binary(min_size=32, max_size=32),
            name=st.text(),
            vocab=st.integers(1, wire.UINT32),
            context=st.integers(1, limits.MAX_TOKENS),
            numerics=st.text(),
        ),
        max_size=3,
    ),
)
def test_a_services_description_arrives_as_it_was_sent(
    version: str, bundles: list[BundleInfo], models: list[ModelInfo]
) -> None:
    info = ServiceInfo(version, limits.WIRE_VERSION, tuple(bundles), tuple(models))
    assert wire.unpack_service(sent(wire.pack_service(info))) == info


def leaves(kind: type[IsthmusError]) -> set[type[IsthmusError]]:
    below: list[type[IsthmusError]] = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


@pytest.mark.parametrize("kind", sorted(leaves(IsthmusError), key=lambda kind: kind.__name__))
def test_an_error_arrives_as_an_error(kind: type[IsthmusError]) -> None:
    with pytest.raises(IsthmusError) as caught:
        wire.unpack_answer(sent(wire.pack_error(7, kind("what was wrong"))), labels=2)
    same_or_known = {errors.BundleError: errors.ServiceError, errors.Draining: errors.LinkDown}
    assert type(caught.value) is same_or_known.get(kind, kind)


@pytest.mark.parametrize("budget_s", [0.0009, 0.0, -1.0, float("nan"), float("-inf")])
def test_a_request_without_time_is_not_sent(budget_s: float) -> None:
    with pytest.raises(DeadlineExceeded, match="less than a millisecond"):
        wire.pack_request(CloudRequest(1, FINGERPRINT, budget_s, REQUEST.payload))


@pytest.mark.parametrize("budget_s", [600.1, 1e12, float("inf")])
def test_a_budget_is_sent_as_at_most_the_limit(budget_s: float) -> None:
    message = wire.pack_request(CloudRequest(1, FINGERPRINT, budget_s, REQUEST.payload))
    assert message.budget_ms == limits.MAX_BUDGET_MS


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[IsthmusError], str]] = {
    "no version": ({"wire_version": 0}, UnsupportedVersion, "wire version 0, this service reads 1"),
    "next version": ({"wire_version": 2}, UnsupportedVersion, "wire version 2"),
    "no bundle": ({"bundle": b""}, InvalidInput, "bundle has 0 bytes, expected 8"),
    "whole fingerprint": ({"bundle": FINGERPRINT}, InvalidInput, "bundle has 32 bytes, expected 8"),
    "other bundle": ({"bundle": bytes(8)}, PayloadCorrupt, "CRC-32"),
    "no request id": ({"request_id": 0}, InvalidInput, "request_id is 0"),
    "no budget": ({"budget_ms": 0}, InvalidInput, "budget_ms is 0, expected 1 to 600000"),
    "wild budget": ({"budget_ms": 600_001}, InvalidInput, "budget_ms is 600001"),
    "no codec": ({"codec": 0}, InvalidInput, "codec 0 is unknown, expected one of [1, 2]"),
    "unknown codec": ({"codec": 77}, InvalidInput, "codec 77 is unknown"),
    "negative codec": ({"codec": -1}, InvalidInput, "codec -1 is unknown"),
    "image at a rate": ({"codec": 2}, InvalidInput, "rate is 2, expected 0 for a whole image"),
    "other rate": ({"rate": 3}, PayloadCorrupt, "CRC-32"),
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


BAD_ANSWERS: dict[str, tuple[pb.InferResponse, str]] = {
    "no probabilities": (pb.InferResponse(), "0 probabilities, expected 2"),
    "too many": (pb.InferResponse(probabilities=[0.2, 0.3, 0.5]), "3 probabilities, expected 2"),
    "not a number": (pb.InferResponse(probabilities=[float("nan"), 0.5]), "not probabilities"),
    "infinite": (pb.InferResponse(probabilities=[float("inf"), 0.5]), "not probabilities"),
    "negative": (pb.InferResponse(probabilities=[-0.5, 1.5]), "not probabilities"),
    "sum of two": (pb.InferResponse(probabilities=[1.0, 1.0]), "not probabilities"),
    "zeros": (pb.InferResponse(probabilities=[0.0, 0.0]), "not probabilities"),
}


@pytest.mark.parametrize(("message", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_an_answer_that_cannot_be_true_is_refused(message: pb.InferResponse, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        wire.unpack_answer(message, labels=2)


def test_an_error_of_code_ok_is_the_services_fault() -> None:
    with pytest.raises(errors.ServiceError):
        wire.unpack_answer(pb.InferResponse(error=pb.Error(), probabilities=[0.5, 0.5]), labels=2)


def described_model(**fields: Any) -> pb.DescribeResponse:
    good = {"fingerprint": FINGERPRINT, "name": "a", "vocab": 10, "context": 20, "numerics": "float32/8"}
    return pb.DescribeResponse(wire_version=1, models=[pb.Model(**{**good, **fields})])


def described(**fields: Any) -> pb.DescribeResponse:
    good = {"fingerprint": FINGERPRINT, "name": "a", "task": "b", "labels": 2, "rates": 1}
    return pb.DescribeResponse(wire_version=1, bundles=[pb.Bundle(**{**good, **fields})])


BAD_SERVICES: dict[str, tuple[pb.DescribeResponse, type[IsthmusError]]] = {
    "other version": (pb.DescribeResponse(wire_version=2), UnsupportedVersion),
    "short fingerprint": (described(fingerprint=bytes(8)), InvalidInput),
    "no labels": (described(labels=0), InvalidInput),
    "wild number of labels": (described(labels=limits.MAX_LABELS + 1), InvalidInput),
    "no rates": (described(rates=0), InvalidInput),
    "too many bundles": (
        pb.DescribeResponse(wire_version=1, bundles=list(described().bundles) * (limits.MAX_BUNDLES + 1)),
        InvalidInput,
    ),
    "short fingerprint of a model": (described_model(fingerprint=bytes(8)), InvalidInput),
    "model without tokens": (described_model(vocab=0), InvalidInput),
    "model without context": (described_model(context=0), InvalidInput),
    "too many models": (
        pb.DescribeResponse(wire_version=1, models=list(described_model().models) * (limits.MAX_BUNDLES + 1)),
        InvalidInput,
    ),
}


def test_the_descriptions_that_those_are_bent_from_are_good() -> None:
    assert len(wire.unpack_service(described()).bundles) == len(wire.unpack_service(described_model()).models) == 1


@pytest.mark.parametrize(("message", "kind"), BAD_SERVICES.values(), ids=BAD_SERVICES.keys())
def test_a_description_that_cannot_be_true_is_refused(message: pb.DescribeResponse, kind: type[IsthmusError]) -> None:
    with pytest.raises(kind):
        wire.unpack_service(message)


@pytest.mark.parametrize("payload", [REQUEST.payload, Payload(Codec.IMAGE, 0, b"\xff\xd8\xff" + bytes(20))])
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


def test_framing_stays_within_its_limit_at_the_largest_usual_values() -> None:
    payload = Payload(Codec.FACTORIZED, 63, bytes(4096))
    message = wire.pack_request(CloudRequest((1 << 21) - 1, FINGERPRINT, 16.0, payload))
    assert message.ByteSize() - len(payload.data) <= limits.MAX_FRAMING_BYTES


def test_the_checksum_is_the_crc_that_the_contract_describes() -> None:
    covered = FINGERPRINT[:8] + b"\1\0\0\0" + b"\2\0\0\0" + b"payload bytes"
    assert wire.pack_request(REQUEST).crc32 == zlib.crc32(covered)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, 0), (-1.0, 0), (1e-6, 1), (0.5e-7, 0), (1.5, 1_500_000), (1e9, wire.UINT32)]
)
def test_seconds_become_microseconds_that_fit(seconds: float, expected: int) -> None:
    assert wire.microseconds(seconds) == expected
