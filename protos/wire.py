"""Convert isthmus.models.messages to and from the protobuf messages of `Infer` and `Describe`.

    CloudRequest -> pack_request -> InferRequest ~~~ InferRequest -> unpack_request -> CloudRequest
    CloudReply -> pack_answer -> InferResponse ~~~ InferResponse -> unpack_answer -> CloudReply or an error

Every message from outside is validated here, before anything is allocated for it. Knows nothing about channels, queues
or networks; `status` maps the errors raised here to gRPC status codes.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Sequence

import grpc
import numpy as np

from isthmus.models.errors import (
    DeadlineExceeded,
    InvalidInput,
    InvalidReply,
    IsthmusError,
    Overloaded,
    PayloadCorrupt,
    PayloadTooLarge,
    UnsupportedVersion,
)
from isthmus.models.messages import (
    CloudReply,
    CloudRequest,
    Codec,
    OutputBounds,
    Payload,
)
from isthmus.protos import limits, status
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.wire_outputs import outputs_checksum, pack_tensor, unpack_outputs

UINT32 = (1 << 32) - 1
MICROSECONDS = 1_000_000
FIRST_TASK = 1  # the bit of task 0


def pack_request(request: CloudRequest) -> pb.InferRequest:
    """Raises DeadlineExceeded when less than a millisecond is left, InvalidInput for a tap, rate or task too large."""
    budget_ms = min(request.budget_s * 1000, limits.MAX_BUDGET_MS)
    if not budget_ms >= 1:
        raise DeadlineExceeded("less than a millisecond is left for the cloud")
    payload = request.payload
    message = pb.InferRequest(
        wire_version=limits.WIRE_VERSION,
        bundle=int.from_bytes(request.fingerprint[: limits.BUNDLE_ID_BYTES], "little"),
        request_id=request.request_id,
        budget_ms=math.floor(budget_ms),
        codec=pb.Codec.ValueType(payload.codec),
        point=pack_point(payload.tap, payload.rate),
        tasks=pack_tasks(request.tasks),
        payload=payload.data,
    )
    message.crc32 = checksum(message)
    return message


def unpack_request(message: pb.InferRequest) -> CloudRequest:
    """Raises UnsupportedVersion, InvalidInput, PayloadTooLarge or PayloadCorrupt, each naming what was expected.

    `fingerprint` of the result is the short form that was sent. Tap, rate and tasks are checked against the limits of
    the wire only; whether the bundle has them is checked later.
    """
    if message.wire_version != limits.WIRE_VERSION:
        raise UnsupportedVersion(f"wire version {message.wire_version}, this service reads {limits.WIRE_VERSION}")
    if message.request_id == 0:
        raise InvalidInput("request_id is 0, expected at least 1")
    if not 1 <= message.budget_ms <= limits.MAX_BUDGET_MS:
        raise InvalidInput(f"budget_ms is {message.budget_ms}, expected 1 to {limits.MAX_BUDGET_MS}")
    if message.codec not in [int(codec) for codec in Codec]:
        raise InvalidInput(f"codec {message.codec} is unknown, expected one of {[int(codec) for codec in Codec]}")
    if len(message.payload) > limits.MAX_IMAGE_BYTES:
        raise PayloadTooLarge(
            f"payload has {len(message.payload)} bytes, at most {limits.MAX_IMAGE_BYTES} are accepted"
        )
    codec = Codec(message.codec)
    if codec is Codec.IMAGE and message.point:
        raise InvalidInput(f"point is {message.point}, expected 0 for a whole image")
    if (found := checksum(message)) != message.crc32:
        raise PayloadCorrupt(f"CRC-32 of the payload is {found:08x}, the request says {message.crc32:08x}")
    tap, rate = unpack_point(message.point)
    return CloudRequest(
        request_id=message.request_id,
        fingerprint=message.bundle.to_bytes(limits.BUNDLE_ID_BYTES, "little"),
        budget_s=message.budget_ms / 1000,
        payload=Payload(codec, tap, rate, message.payload),
        tasks=unpack_tasks(message.tasks),
    )


def pack_point(tap: int, rate: int) -> int:
    if tap < 0 or not 0 <= rate < limits.MAX_RATES:
        raise InvalidInput(f"tap {tap}, rate {rate}: expected 0 or more, and 0 to {limits.MAX_RATES - 1}")
    return tap * limits.MAX_RATES + rate


def unpack_point(point: int) -> tuple[int, int]:
    return divmod(point, limits.MAX_RATES)


def pack_tasks(tasks: Sequence[int]) -> int:
    if not tasks or not all(0 <= task < limits.MAX_TASKS for task in tasks):
        raise InvalidInput(f"tasks {tuple(tasks)}: expected one or more of 0 to {limits.MAX_TASKS - 1}")
    bits = sum(1 << task for task in set(tasks))
    return 0 if bits == FIRST_TASK else bits


def unpack_tasks(bits: int) -> tuple[int, ...]:
    return tuple(task for task in range(bits.bit_length()) if bits >> task & 1) or (0,)


def pack_answer(request_id: int, answer: CloudReply) -> pb.InferResponse:
    message = pb.InferResponse(
        request_id=request_id,
        probabilities=itertools.chain.from_iterable(answer.probabilities),
        queue_us=microseconds(answer.queue_s),
        compute_us=microseconds(answer.compute_s),
        outputs=[pack_tensor(tensor) for tensor in answer.outputs],
    )
    message.crc32 = answer_checksum(message)
    return message


def pack_error(request_id: int, error: Exception) -> pb.InferResponse:
    message = pb.InferResponse(request_id=request_id, error=pack_failure(error))
    message.crc32 = answer_checksum(message)
    return message


def pack_failure(error: Exception) -> pb.Error:
    """What a peer is told of an error."""
    code, text = status.of_error(error)
    retry_ms = round(1000 * error.retry_s) if isinstance(error, Overloaded) else 0
    return pb.Error(code=code.value[0], message=text, retry_ms=min(retry_ms, limits.MAX_BUDGET_MS))


def unpack_failure(message: pb.Error) -> IsthmusError:
    """The error that a peer told of."""
    error = status.to_error(status.code_of(message.code), message.message)
    if isinstance(error, Overloaded):
        error.retry_s = min(message.retry_ms, limits.MAX_BUDGET_MS) / 1000
    return error


def unpack_answer(message: pb.InferResponse, expected: Sequence[int | OutputBounds]) -> CloudReply:
    """`expected` of each requested task, in the bundle's order: its number of classes, or what its outputs must be.

    Raises the error that the response carries, or InvalidReply unless its checksum is right, it holds that many
    probabilities, those of each task sum to 1, and it has the outputs that are expected.
    """
    check_answer(message)
    if message.HasField("error"):
        raise unpack_failure(message.error)
    labels = [each for each in expected if isinstance(each, int)]
    if len(message.probabilities) != sum(labels):
        raise InvalidReply(f"the cloud sent {len(message.probabilities)} probabilities, expected {sum(labels)}")
    rest = iter(message.probabilities)
    answers = tuple(tuple(itertools.islice(rest, count)) for count in labels)
    for answer in answers:
        if not all(0 <= p <= 1 for p in answer) or not math.isclose(sum(answer), 1, abs_tol=1e-3):
            raise InvalidReply("the cloud sent values that are not probabilities")
    outputs = unpack_outputs(message.outputs, [each for each in expected if not isinstance(each, int)])
    return CloudReply(answers, message.queue_us / MICROSECONDS, message.compute_us / MICROSECONDS, outputs)


def checksum(message: pb.InferRequest) -> int:
    """CRC-32 over the payload and every field that determines how it is decoded, and what is answered to whom."""
    head = struct.pack("<IQiII", message.request_id, message.bundle, message.codec, message.point, message.tasks)
    return zlib.crc32(message.payload, zlib.crc32(head))


def answer_checksum(message: pb.InferResponse) -> int:
    """CRC-32 over the request that is answered and every field of the answer."""
    error = message.error
    head = struct.pack("<5I", message.request_id, message.queue_us, message.compute_us, error.code, error.retry_ms)
    probabilities = np.asarray(message.probabilities, "<f4").tobytes()
    found = zlib.crc32(error.message.encode(), zlib.crc32(probabilities, zlib.crc32(head)))
    return outputs_checksum(message.outputs, found)


def check_answer(message: pb.InferResponse) -> None:
    """Raises InvalidReply unless the checksum is right: until then even its request id may be another's."""
    if (found := answer_checksum(message)) != message.crc32:
        raise InvalidReply(f"CRC-32 of the answer is {found:08x}, the answer says {message.crc32:08x}")


def is_drain_notice(message: pb.InferResponse) -> bool:
    """Whether the service says that it is shutting down. Such a response answers no request."""
    unavailable = message.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    return not message.request_id and unavailable and answer_checksum(message) == message.crc32


def microseconds(seconds: float) -> int:
    return min(max(round(seconds * MICROSECONDS), 0), UINT32)
