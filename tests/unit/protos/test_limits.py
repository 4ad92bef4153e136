from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from isthmus.protos import limits
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb


def test_the_largest_image_fits_into_a_message() -> None:
    message = pb.InferRequest(
        wire_version=limits.WIRE_VERSION,
        bundle=(1 << 64) - 1,
        request_id=(1 << 32) - 1,
        budget_ms=limits.MAX_BUDGET_MS,
        crc32=1,
        codec=pb.CODEC_IMAGE,
        tasks=(1 << limits.MAX_TASKS) - 1,
        payload=bytes(limits.MAX_IMAGE_BYTES),
    )
    assert message.ByteSize() <= limits.MAX_MESSAGE_BYTES


def test_the_largest_answer_fits_into_a_message() -> None:
    answer = pb.InferResponse(request_id=(1 << 32) - 1, probabilities=[0.5] * limits.MAX_LABELS * limits.MAX_TASKS)
    assert answer.ByteSize() <= limits.MAX_MESSAGE_BYTES


def test_the_largest_states_fit_into_a_message() -> None:
    tokens, states = [(1 << 32) - 1] * limits.MAX_STATES, [bytes(limits.MAX_STATE_BYTES)] * limits.MAX_STATES
    round_ = pb.Round(base=limits.MAX_TOKENS, draft=tokens, extend=1, states=states, crc32=1)
    assert pb.GenerateRequest(round=round_).ByteSize() <= limits.MAX_MESSAGE_BYTES / 3


def test_the_service_allows_pings_as_often_as_devices_send_them() -> None:
    client, server = dict(limits.client_options()), dict(limits.server_options())
    assert int(server["grpc.http2.min_ping_interval_without_data_ms"]) < int(client["grpc.keepalive_time_ms"])


def test_a_channel_takes_the_options() -> None:
    with grpc.insecure_channel("127.0.0.1:9", options=limits.client_options()) as channel:
        assert channel is not None
    assert not dict(limits.client_options()).keys() & {"grpc.keepalive_timeout_ms"}  # no effect, see limits


@pytest.mark.parametrize("options", [limits.client_options(), limits.server_options()], ids=["client", "server"])
def test_grpc_knows_every_option(options: limits.ChannelOptions) -> None:
    """gRPC ignores options that it does not know. Its names are strings in the compiled extension."""
    known = set(re.findall(rb"grpc\.[a-z0-9_.]+", Path(cygrpc.__file__).read_bytes()))
    assert {name for name, _ in options if name.encode() not in known} == set()


def test_an_idle_stream_is_half_closed_before_a_third_ping() -> None:
    """Looked for twice in that time, and the wait for it varies by a tenth."""
    assert 1000 * limits.IDLE_STREAM_S * 1.55 < 3 * limits.KEEPALIVE_MS
