"""models.types <-> messages. Bytes from outside are checked here before anything is allocated for them.

Knows nothing about channels, queues or networks; `status` turns what is raised here into gRPC codes.

    CloudRequest -> pack_request -> InferRequest ~~~ InferRequest -> unpack_request -> CloudRequest
    CloudAnswer  -> pack_answer -> InferResponse ~~~ InferResponse -> unpack_answer -> CloudAnswer or an error
"""

from __future__ import annotations

import math
import zlib

from models.errors import (
    DeadlineExceeded,
    InvalidInput,
    PayloadCorrupt,
    PayloadTooLarge,
    UnsupportedVersion,
)
from models.language.session import ModelInfo
from models.types import BundleInfo, CloudAnswer, CloudRequest, Codec, Payload, ServiceInfo
from protos import limits, status
from protos.isthmus.v1 import isthmus_pb2 as pb

UINT32 = (1 << 32) - 1
MICROSECONDS = 1_000_000


def pack_request(request: CloudRequest) -> pb.InferRequest:
    """Raises DeadlineExceeded when less than a millisecond is left."""
    budget_ms = min(request.budget_s * 1000, limits.MAX_BUDGET_MS)
    if not budget_ms >= 1:
        raise DeadlineExceeded("less than a millisecond is left to ask the cloud")
    bundle = request.fingerprint[: limits.BUNDLE_ID_BYTES]
    payload = request.payload
    return pb.InferRequest(
        wire_version=limits.WIRE_VERSION,
        bundle=bundle,
        request_id=request.request_id,
        budget_ms=math.floor(budget_ms),
        crc32=checksum(bundle, payload.codec, payload.rate, payload.data),
        codec=pb.Codec.ValueType(payload.codec),
        rate=payload.rate,
        payload=payload.data,
    )


def unpack_request(message: pb.InferRequest) -> CloudRequest:
    """Raises UnsupportedVersion, InvalidInput, PayloadTooLarge or PayloadCorrupt, each naming what was expected.

    `fingerprint` of the result is the short form that was sent.
    """
    if message.wire_version != limits.WIRE_VERSION:
        raise UnsupportedVersion(f"wire version {message.wire_version}, this service reads {limits.WIRE_VERSION}")
    if len(message.bundle) != limits.BUNDLE_ID_BYTES:
        raise InvalidInput(f"bundle has {len(message.bundle)} bytes, expected {limits.BUNDLE_ID_BYTES}")
    if message.request_id == 0:
        raise InvalidInput("request_id is 0, expected at least 1")
    if not 1 <= message.budget_ms <= limits.MAX_BUDGET_MS:
        raise InvalidInput(f"budget_ms is {message.budget_ms}, expected 1 to {limits.MAX_BUDGET_MS}")
    if message.codec not in [int(codec) for codec in Codec]:
        raise InvalidInput(f"codec {message.codec} is unknown, expected one of {[int(codec) for codec in Codec]}")
    if len(message.payload) > limits.MAX_IMAGE_BYTES:
        raise PayloadTooLarge(f"payload has {len(message.payload)} bytes, at most {limits.MAX_IMAGE_BYTES} are taken")
    codec = Codec(message.codec)
    if codec is Codec.IMAGE and message.rate:
        raise InvalidInput(f"rate is {message.rate}, expected 0 for a whole image")
    found = checksum(message.bundle, codec, message.rate, message.payload)
    if found != message.crc32:
        raise PayloadCorrupt(f"CRC-32 of the payload is {found:08x}, the request says {message.crc32:08x}")
    return CloudRequest(
        request_id=message.request_id,
        fingerprint=message.bundle,
        budget_s=message.budget_ms / 1000,
        payload=Payload(codec, message.rate, message.payload),
    )


def pack_answer(request_id: int, answer: CloudAnswer) -> pb.InferResponse:
    return pb.InferResponse(
        request_id=request_id,
        probabilities=answer.probabilities,
        queue_us=microseconds(answer.queue_s),
        compute_us=microseconds(answer.compute_s),
    )


def pack_error(request_id: int, error: Exception) -> pb.InferResponse:
    code, text = status.of_error(error)
    return pb.InferResponse(request_id=request_id, error=pb.Error(code=code.value[0], message=text))


def unpack_answer(message: pb.InferResponse, labels: int) -> CloudAnswer:
    """Raises the error that the response carries, or InvalidInput unless it holds `labels` probabilities."""
    if message.HasField("error"):
        raise status.to_error(status.code_of(message.error.code), message.error.message)
    if len(message.probabilities) != labels:
        raise InvalidInput(f"the cloud sent {len(message.probabilities)} probabilities, expected {labels}")
    probabilities = tuple(message.probabilities)
    if not all(0 <= p <= 1 for p in probabilities) or not math.isclose(sum(probabilities), 1, abs_tol=1e-3):
        raise InvalidInput("the cloud sent numbers that are not probabilities")
    return CloudAnswer(probabilities, message.queue_us / MICROSECONDS, message.compute_us / MICROSECONDS)


def pack_service(info: ServiceInfo) -> pb.DescribeResponse:
    bundles = [
        pb.Bundle(fingerprint=b.fingerprint, name=b.name, task=b.task, labels=b.labels, rates=b.rates)
        for b in info.bundles
    ]
    models = [
        pb.Model(fingerprint=m.fingerprint, name=m.name, vocab=m.vocab, context=m.context, numerics=m.numerics)
        for m in info.models
    ]
    return pb.DescribeResponse(version=info.version, wire_version=info.wire_version, bundles=bundles, models=models)


def unpack_service(message: pb.DescribeResponse) -> ServiceInfo:
    """Raises UnsupportedVersion for another wire version, InvalidInput for a list that cannot be true."""
    if message.wire_version != limits.WIRE_VERSION:
        raise UnsupportedVersion(
            f"the service reads wire version {message.wire_version}, we write {limits.WIRE_VERSION}"
        )
    if len(message.bundles) + len(message.models) > limits.MAX_BUNDLES:
        raise InvalidInput(f"the service lists {len(message.bundles)} bundles, at most {limits.MAX_BUNDLES} are read")
    for b in message.bundles:
        if len(b.fingerprint) != limits.FINGERPRINT_BYTES or not 0 < b.labels <= limits.MAX_LABELS or not b.rates:
            raise InvalidInput("the service lists a bundle whose fingerprint, labels or rates cannot be true")
    for m in message.models:
        if len(m.fingerprint) != limits.FINGERPRINT_BYTES or not m.vocab or not m.context:
            raise InvalidInput("the service lists a model whose fingerprint, vocabulary or context cannot be true")
    bundles = tuple(BundleInfo(b.fingerprint, b.name, b.task, b.labels, b.rates) for b in message.bundles)
    models = tuple(ModelInfo(m.fingerprint, m.name, m.vocab, m.context, m.numerics) for m in message.models)
    return ServiceInfo(message.version, message.wire_version, bundles, models)


def checksum(bundle: bytes, codec: Codec, rate: int, data: bytes) -> int:
    """CRC-32 over everything that decides how the payload is read."""
    head = bundle + int(codec).to_bytes(4, "little") + (rate & UINT32).to_bytes(4, "little")
    return zlib.crc32(data, zlib.crc32(head))


def microseconds(seconds: float) -> int:
    return min(max(round(seconds * MICROSECONDS), 0), UINT32)
