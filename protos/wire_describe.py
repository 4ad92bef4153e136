"""Convert what a service says of itself to and from the protobuf messages of `Describe` and `Tokenizer`.

    ServiceInfo -> pack_service -> DescribeResponse ~~~ unpack_service -> ServiceInfo
    bytes of a tokenizer -> pack_tokenizer -> TokenizerPart ... ~~~ unpack_tokenizer -> the same bytes

Every message from outside is validated here, before anything is allocated for it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from google.protobuf.message import DecodeError

from isthmus.models.errors import InvalidReply, UnsupportedVersion
from isthmus.models.messages import (
    MAX_TOKENIZER_BYTES,
    BundleInfo,
    CloudArm,
    ModelInfo,
    Numerics,
    Processor,
    ServiceInfo,
    TapInfo,
    TaskInfo,
    TaskKind,
    TokenizerInfo,
)
from isthmus.protos import limits
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

TASK_KINDS: dict[str, TaskKind] = {"": "classify", "detect": "detect", "segment": "segment", "embed": "embed"}
DESCRIBE = "/isthmus.v1.Isthmus/Describe"


def pack_service(info: ServiceInfo, padding: int = 0) -> pb.DescribeResponse:
    """`padding`: bytes for a device that measures the way down; random, so that nothing on the way compresses them."""
    bundles = [
        pb.Bundle(
            fingerprint=b.fingerprint,
            name=b.name,
            tasks=[pack_task(task) for task in b.tasks],
            taps=[pb.Tap(name=tap.name, rates=tap.rates) for tap in b.taps],
        )
        for b in info.bundles
    ]
    models = [pack_model(model) for model in info.models]
    return pb.DescribeResponse(
        version=info.version,
        wire_version=info.wire_version,
        bundles=bundles,
        models=models,
        problems=[problem[: limits.MAX_ERROR_CHARACTERS] for problem in info.problems],
        padding=random.randbytes(padding),
    )


def unpack_service(message: pb.DescribeResponse) -> ServiceInfo:
    """Raises UnsupportedVersion for another wire version, InvalidReply for values out of range."""
    if message.wire_version != limits.WIRE_VERSION:
        raise UnsupportedVersion(
            f"the service reads wire version {message.wire_version}, this device writes {limits.WIRE_VERSION}"
        )
    if len(message.bundles) + len(message.models) > limits.MAX_BUNDLES:
        raise InvalidReply(f"the service lists {len(message.bundles)} bundles, at most {limits.MAX_BUNDLES} are read")
    bundles = tuple(unpack_bundle(bundle) for bundle in message.bundles)
    models = tuple(map(unpack_model, message.models))
    problems = tuple(text[: limits.MAX_ERROR_CHARACTERS] for text in message.problems[: limits.MAX_BUNDLES])
    return ServiceInfo(message.version, message.wire_version, bundles, models, problems)


def describe(call: Callable[[bytes], bytes]) -> ServiceInfo:
    """What a service says over `call`, which sends a message to DESCRIBE. Raises as `unpack_service`."""
    raw = call(pb.DescribeRequest().SerializeToString())
    try:
        return unpack_service(pb.DescribeResponse.FromString(raw))
    except DecodeError as error:
        raise InvalidReply("the service answered bytes that are no message") from error


def pack_model(model: ModelInfo) -> pb.Model:
    tokenizer = model.tokenizer
    return pb.Model(
        fingerprint=model.fingerprint,
        name=model.name,
        vocab=model.vocab,
        context=model.context,
        numerics=model.numerics,
        handoffs=model.handoffs,
        precision=model.precision,
        tokenizer=pb.Tokenizer(sha256=tokenizer.sha256, size=tokenizer.size_bytes, vocabulary=tokenizer.vocabulary),
        end_ids=model.end_ids,
        arms=model.arms,
        compared=model.compared,
        mismatched=model.mismatched,
        processors=model.processors,
        scores=model.scores,
    )


def unpack_model(message: pb.Model) -> ModelInfo:
    """Raises InvalidReply for values out of range. Arms and processors that this device does not know are left out."""
    tokenizer = message.tokenizer
    if len(message.fingerprint) != limits.FINGERPRINT_BYTES or not message.vocab or not message.context:
        raise InvalidReply("the service lists a model with an invalid fingerprint, vocabulary or context")
    if len(message.handoffs) > limits.MAX_BUNDLES or {*map(len, message.handoffs)} - {limits.FINGERPRINT_BYTES}:
        raise InvalidReply("the service lists a model with invalid fingerprints of handoff bundles")
    if {len(tokenizer.sha256), len(tokenizer.vocabulary)} != {limits.FINGERPRINT_BYTES}:
        raise InvalidReply("the service lists a model with invalid fingerprints of its tokenizer")
    if not 1 <= tokenizer.size <= MAX_TOKENIZER_BYTES:
        raise InvalidReply(
            f"the service lists a tokenizer of {tokenizer.size} bytes, expected 1 to {MAX_TOKENIZER_BYTES}"
        )
    if len(message.end_ids) > limits.MAX_END_IDS or any(id_ >= message.vocab for id_ in message.end_ids):
        raise InvalidReply("the service lists a model with end ids outside of its vocabulary, or too many")
    if message.numerics not in get_args(Numerics) or message.mismatched > message.compared:
        raise InvalidReply("the service lists a model with unknown numerics, or more mismatches than comparisons")
    return ModelInfo(
        fingerprint=message.fingerprint,
        name=message.name,
        vocab=message.vocab,
        context=message.context,
        numerics="bitwise" if message.numerics == "bitwise" else "engine",
        tokenizer=TokenizerInfo(tokenizer.sha256, tokenizer.size, tokenizer.vocabulary),
        end_ids=tuple(message.end_ids),
        arms=tuple(arm for arm in get_args(CloudArm) if arm in message.arms),
        precision=message.precision,
        handoffs=tuple(message.handoffs),
        compared=message.compared,
        mismatched=message.mismatched,
        processors=tuple(name for name in get_args(Processor) if name in message.processors),
        scores=message.scores,
    )


def pack_task(task: TaskInfo) -> pb.Task:
    """Without its kind where it classifies."""
    return pb.Task(name=task.name, labels=task.labels, kind="" if task.kind == "classify" else task.kind)


def unpack_bundle(message: pb.Bundle) -> BundleInfo:
    """Raises InvalidReply for values out of range."""
    valid = (
        len(message.fingerprint) == limits.FINGERPRINT_BYTES
        and 1 <= len(message.tasks) <= limits.MAX_TASKS
        and 1 <= len(message.taps) <= limits.MAX_TAPS
        and all(bool(not task.kind) + 1 <= task.labels <= limits.MAX_LABELS for task in message.tasks)
        and all(task.kind in TASK_KINDS for task in message.tasks)
        and all(1 <= tap.rates <= limits.MAX_RATES for tap in message.taps)
    )
    if not valid:
        raise InvalidReply(
            "the service lists a bundle with an invalid fingerprint, kind of task, number of labels or number of rates"
        )
    tasks = tuple(TaskInfo(task.name, task.labels, TASK_KINDS[task.kind]) for task in message.tasks)
    return BundleInfo(
        message.fingerprint, message.name, tasks, tuple(TapInfo(tap.name, tap.rates) for tap in message.taps)
    )


def pack_tokenizer(raw: bytes) -> Iterator[pb.TokenizerPart]:
    """A tokenizer in parts."""
    for start in range(0, len(raw), limits.TOKENIZER_PART_BYTES):
        yield pb.TokenizerPart(data=raw[start : start + limits.TOKENIZER_PART_BYTES])


def unpack_tokenizer(parts: Iterable[pb.TokenizerPart], info: TokenizerInfo) -> bytes:
    """The parts together. Raises InvalidReply as soon as they cannot be what `info` declares."""
    raw = bytearray()
    for part in parts:
        if not part.data:
            raise InvalidReply("the cloud sends an empty part of a tokenizer")
        raw += part.data
        if len(raw) > info.size_bytes:
            raise InvalidReply(
                f"the cloud sends more than the {info.size_bytes} bytes of the tokenizer that it declares"
            )
    if hashlib.sha256(raw).digest() != info.sha256:
        raise InvalidReply(f"the cloud sent {len(raw)} bytes that are not the tokenizer {info.sha256.hex()[:12]}")
    return bytes(raw)
