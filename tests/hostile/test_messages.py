"""Messages made to hurt: whatever bytes arrive, they parse to a request of ours or end in a known error."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import CallerError, IsthmusError, PayloadCorrupt, UnsupportedVersion
from isthmus.models.messages import CloudRequest, Codec, Payload
from isthmus.protos import wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

GOOD = wire.pack_request(CloudRequest(1, bytes(32), 1.0, Payload(Codec.BOTTLENECK, 1, 2, bytes(range(64))), (0, 1)))


@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_request(data: bytes) -> None:
    with contextlib.suppress(DecodeError), pytest.raises((CallerError, UnsupportedVersion)):
        wire.unpack_request(pb.InferRequest.FromString(data))


@given(data=st.binary(max_size=300), labels=st.lists(st.integers(2, 10), min_size=1, max_size=8))
def test_random_bytes_are_no_answer(data: bytes, labels: list[int]) -> None:
    with contextlib.suppress(DecodeError), pytest.raises(IsthmusError):
        wire.unpack_answer(pb.InferResponse.FromString(data), labels)


def test_no_shortened_request_is_accepted() -> None:
    data = GOOD.SerializeToString()
    for size in range(len(data)):
        with pytest.raises((DecodeError, CallerError, UnsupportedVersion)):
            wire.unpack_request(pb.InferRequest.FromString(data[:size]))


def test_a_field_sent_twice_is_covered_by_the_checksum() -> None:
    second = pb.InferRequest(payload=b"another payload").SerializeToString()
    with pytest.raises(PayloadCorrupt):
        wire.unpack_request(pb.InferRequest.FromString(GOOD.SerializeToString() + second))


def test_unknown_fields_of_a_later_sender_change_nothing() -> None:
    later = pb.InferRequest.FromString(GOOD.SerializeToString() + b"\xfa\x07\x03abc")  # field 127, three bytes
    assert wire.unpack_request(later) == wire.unpack_request(GOOD)


def test_a_length_that_lies_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(DecodeError):
        pb.InferRequest.FromString(b"\x42\xff\xff\xff\xff\x07abc")  # payload of 2 GiB, three bytes there
