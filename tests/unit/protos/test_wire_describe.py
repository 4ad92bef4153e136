from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import InvalidReply, IsthmusError, UnsupportedVersion
from isthmus.models.messages import (
    MAX_TOKENIZER_BYTES,
    BundleInfo,
    ModelInfo,
    Numerics,
    ServiceInfo,
    TapInfo,
    TaskInfo,
    TokenizerInfo,
)
from isthmus.protos import limits, wire, wire_describe
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

FINGERPRINT = bytes(range(32))
BUNDLE = BundleInfo(
    FINGERPRINT, "elpv", (TaskInfo("defect", 2), TaskInfo("cell_type", 2)), (TapInfo("light", 6), TapInfo("deep", 4))
)
SERVICE = ServiceInfo("0.1.0", limits.WIRE_VERSION, (BUNDLE,))
TOKENIZER = TokenizerInfo(FINGERPRINT, 2_100_000, FINGERPRINT[::-1])
MODEL = ModelInfo(
    FINGERPRINT, "SmolLM2", 49_152, 8192, "bitwise", TOKENIZER, (2, 0), ("cloud", "verify"), "bfloat16/16"
)

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def test_describe_response_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("describe_response_v3.bin", wire_describe.pack_service(SERVICE).SerializeToString(deterministic=True))


def test_describe_response_with_a_language_model_is_golden(golden: Callable[[str, bytes], None]) -> None:
    message = wire_describe.pack_service(dataclasses.replace(SERVICE, models=(MODEL,)))
    golden("describe_models_v3.bin", message.SerializeToString(deterministic=True))


def test_describe_response_with_a_handoff_is_golden(golden: Callable[[str, bytes], None]) -> None:
    model = dataclasses.replace(MODEL, handoffs=(bytes(range(32)),), arms=("cloud", "verify", "handoff"))
    info = dataclasses.replace(SERVICE, models=(model,))
    message = wire_describe.pack_service(info)
    golden("describe_handoff_v3.bin", message.SerializeToString(deterministic=True))
    assert wire_describe.unpack_service(message) == info


def test_describe_response_with_processors_is_golden(golden: Callable[[str, bytes], None]) -> None:
    info = dataclasses.replace(SERVICE, models=(dataclasses.replace(MODEL, processors=("logit_bias", "regex")),))
    message = wire_describe.pack_service(info)
    golden("describe_processors_v3.bin", message.SerializeToString(deterministic=True))
    message.models[0].processors.append("one of a later version")
    assert wire_describe.unpack_service(message) == info


def test_a_model_that_scores_texts_says_so() -> None:
    info = dataclasses.replace(SERVICE, models=(dataclasses.replace(MODEL, scores=True),))
    assert wire_describe.unpack_service(wire_describe.pack_service(info)) == info


def test_describe_request_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("describe_request_v3.bin", pb.DescribeRequest(padding=bytes(3)).SerializeToString(deterministic=True))


def few(entries: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(entries, min_size=1, max_size=8).map(tuple)


def sent(message: M) -> M:
    """What arrives at the other end."""
    return type(message).FromString(message.SerializeToString())


@given(
    version=st.text(),
    bundles=st.lists(
        st.builds(
            BundleInfo,
            fingerprint=st.binary(min_size=32, max_size=32),
            name=st.text(),
            tasks=few(st.builds(TaskInfo, st.text(), st.integers(2, limits.MAX_LABELS))),
            taps=few(st.builds(TapInfo, st.text(), st.integers(1, limits.MAX_RATES))),
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
            numerics=st.sampled_from(get_args(Numerics)),
            tokenizer=st.builds(
                TokenizerInfo,
                sha256=st.binary(min_size=32, max_size=32),
                size_bytes=st.integers(1, MAX_TOKENIZER_BYTES),
                vocabulary=st.binary(min_size=32, max_size=32),
            ),
            end_ids=st.sampled_from([(), (0,), (0, 0)]),
            arms=st.sampled_from([(), ("cloud",), ("cloud", "verify", "handoff")]),
            precision=st.text(),
            handoffs=st.sampled_from([(), (bytes(range(32)),), (bytes(32), bytes(range(32)))]),
            compared=st.integers(10, 20),
            mismatched=st.integers(0, 10),
        ),
        max_size=3,
    ),
)
def test_a_services_description_arrives_as_it_was_sent(
    version: str, bundles: list[BundleInfo], models: list[ModelInfo]
) -> None:
    info = ServiceInfo(version, limits.WIRE_VERSION, tuple(bundles), tuple(models), ("an engine is lost", ""))
    assert wire_describe.unpack_service(sent(wire_describe.pack_service(info))) == info


def test_problems_are_bounded() -> None:
    message = pb.DescribeResponse(wire_version=limits.WIRE_VERSION, problems=["x" * 1000] * 2000)
    problems = wire_describe.unpack_service(message).problems
    assert (len(problems), len(problems[0])) == (limits.MAX_BUNDLES, limits.MAX_ERROR_CHARACTERS)


def test_a_service_is_described_over_any_call() -> None:
    info = wire_describe.describe(lambda raw: wire_describe.pack_service(SERVICE).SerializeToString())
    assert info == SERVICE
    with pytest.raises(InvalidReply, match="no message"):
        wire_describe.describe(lambda raw: b"\xff\xff")


def described_model(**fields: Any) -> pb.DescribeResponse:
    tokenizer = pb.Tokenizer(sha256=FINGERPRINT, size=1, vocabulary=FINGERPRINT)
    good = {"fingerprint": FINGERPRINT, "name": "a", "vocab": 10, "context": 20, "numerics": "bitwise"}
    good |= {"tokenizer": tokenizer, "end_ids": [9], "arms": ["cloud"]}
    return pb.DescribeResponse(wire_version=limits.WIRE_VERSION, models=[pb.Model(**{**good, **fields})])


def described_tokenizer(**fields: Any) -> pb.DescribeResponse:
    good = {"sha256": FINGERPRINT, "size": 1, "vocabulary": FINGERPRINT}
    return described_model(tokenizer=pb.Tokenizer(**{**good, **fields}))


def described(**fields: Any) -> pb.DescribeResponse:
    tasks, taps = [pb.Task(name="b", labels=2)], [pb.Tap(name="c", rates=1)]
    good = {"fingerprint": FINGERPRINT, "name": "a", "tasks": tasks, "taps": taps}
    return pb.DescribeResponse(wire_version=limits.WIRE_VERSION, bundles=[pb.Bundle(**{**good, **fields})])


def many(entries: dict[str, list[Any]]) -> pb.DescribeResponse:
    """More of them than are read."""
    count = limits.MAX_BUNDLES + 1
    return pb.DescribeResponse(
        wire_version=limits.WIRE_VERSION, **{name: list(e) * count for name, e in entries.items()}
    )


BAD_SERVICES: dict[str, tuple[pb.DescribeResponse, type[IsthmusError]]] = {
    "other version": (pb.DescribeResponse(wire_version=1), UnsupportedVersion),
    "short fingerprint": (described(fingerprint=bytes(8)), InvalidReply),
    "no tasks": (described(tasks=[]), InvalidReply),
    "nine tasks": (described(tasks=[pb.Task(labels=2)] * 9), InvalidReply),
    "one label": (described(tasks=[pb.Task(labels=2), pb.Task(labels=1)]), InvalidReply),
    "no label of a detector": (described(tasks=[pb.Task(labels=0, kind="detect")]), InvalidReply),
    "unknown kind": (described(tasks=[pb.Task(labels=2, kind="guess")]), InvalidReply),
    "wild number of labels": (described(tasks=[pb.Task(labels=limits.MAX_LABELS + 1)]), InvalidReply),
    "no taps": (described(taps=[]), InvalidReply),
    "nine taps": (described(taps=[pb.Tap(rates=1)] * 9), InvalidReply),
    "no rates": (described(taps=[pb.Tap(rates=0)]), InvalidReply),
    "65 rates": (described(taps=[pb.Tap(rates=65)]), InvalidReply),
    "too many bundles": (many({"bundles": list(described().bundles)}), InvalidReply),
    "short fingerprint of a model": (described_model(fingerprint=bytes(8)), InvalidReply),
    "short fingerprint of a handoff": (described_model(handoffs=[bytes(8)]), InvalidReply),
    "too many handoffs": (described_model(handoffs=[bytes(32)] * (limits.MAX_BUNDLES + 1)), InvalidReply),
    "model without tokens": (described_model(vocab=0), InvalidReply),
    "model without context": (described_model(context=0), InvalidReply),
    "model without a tokenizer": (described_model(tokenizer=None), InvalidReply),
    "short fingerprint of a tokenizer": (described_tokenizer(sha256=bytes(8)), InvalidReply),
    "short fingerprint of a vocabulary": (described_tokenizer(vocabulary=bytes(8)), InvalidReply),
    "empty tokenizer": (described_tokenizer(size=0), InvalidReply),
    "wild size of a tokenizer": (described_tokenizer(size=MAX_TOKENIZER_BYTES + 1), InvalidReply),
    "end id outside of the vocabulary": (described_model(end_ids=[10]), InvalidReply),
    "too many end ids": (described_model(end_ids=[1] * (limits.MAX_END_IDS + 1)), InvalidReply),
    "unknown numerics": (described_model(numerics="float32/8"), InvalidReply),
    "more mismatches than comparisons": (described_model(compared=1, mismatched=2), InvalidReply),
    "too many models": (many({"models": list(described_model().models)}), InvalidReply),
}


def test_the_descriptions_that_those_are_bent_from_are_good() -> None:
    for message in (described(), described_model(), described_tokenizer()):
        info = wire_describe.unpack_service(message)
        assert len(info.bundles) + len(info.models) == 1


@pytest.mark.parametrize(("message", "kind"), BAD_SERVICES.values(), ids=BAD_SERVICES.keys())
def test_a_description_that_cannot_be_true_is_refused(message: pb.DescribeResponse, kind: type[IsthmusError]) -> None:
    with pytest.raises(kind):
        wire_describe.unpack_service(message)


def test_a_tokenizer_s_parts_and_request_are_golden(golden: Callable[[str, bytes], None]) -> None:
    (part,) = wire_describe.pack_tokenizer(b"a tokenizer")
    golden("tokenizer_part_v3.bin", part.SerializeToString(deterministic=True))
    golden("tokenizer_request_v3.bin", pb.TokenizerRequest(sha256=FINGERPRINT).SerializeToString(deterministic=True))


def info_of(raw: bytes) -> TokenizerInfo:
    return TokenizerInfo(hashlib.sha256(raw).digest(), len(raw), FINGERPRINT)


@pytest.mark.parametrize("size", [1, limits.TOKENIZER_PART_BYTES, 2 * limits.TOKENIZER_PART_BYTES + 1])
def test_a_tokenizer_arrives_as_it_was_sent_in_parts_that_a_message_holds(size: int) -> None:
    raw = bytes(range(256)) * (size // 256 + 1)
    parts = list(wire_describe.pack_tokenizer(raw[:size]))
    assert max(part.ByteSize() for part in parts) < limits.MAX_MESSAGE_BYTES
    assert wire_describe.unpack_tokenizer(map(sent, parts), info_of(raw[:size])) == raw[:size]


def test_a_tokenizer_that_is_not_the_declared_one_is_refused() -> None:
    info = info_of(b"a tokenizer")
    for wrong in (b"", b"a tokenize", b"a tokenizes"):
        with pytest.raises(InvalidReply, match="are not the tokenizer"):
            wire_describe.unpack_tokenizer(wire_describe.pack_tokenizer(wrong), info)


def test_a_tokenizer_larger_than_declared_is_not_read_on() -> None:
    def endless() -> Any:
        while True:
            yield pb.TokenizerPart(data=bytes(8))

    with pytest.raises(InvalidReply, match="more than the 11 bytes"):
        wire_describe.unpack_tokenizer(endless(), info_of(b"a tokenizer"))


def test_arms_that_this_device_does_not_know_are_left_out() -> None:
    (model,) = wire_describe.unpack_service(described_model(arms=["cloud", "telepathy"])).models
    assert model.arms == ("cloud",)
