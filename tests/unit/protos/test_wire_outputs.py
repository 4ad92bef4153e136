from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import InvalidReply
from isthmus.models.messages import CloudReply, OutputTensor
from isthmus.models.vision.outputs import bounds_of, named, to_runs
from isthmus.models.vision.tasks import ClassifyTask, DetectTask, EmbedTask, SegmentTask
from isthmus.protos import wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

SIZE = (32, 48)  # height, width of the network's input
DETECT = DetectTask(name="things", labels=("dog", "cat"), max_boxes=3, min_score=0.25, nms_iou=0.5)
SEGMENT = SegmentTask(name="ground", labels=("road", "grass"), shape=(2, 3))
EMBED = EmbedTask(name="likeness", size=4)
CLASSIFY = ClassifyTask(name="defect", labels=("good", "bad"))
EXPECTED = [bounds_of(task, SIZE) for task in (CLASSIFY, DETECT, SEGMENT, EMBED)]
BOXES = (
    np.array([[0, 0, 10, 10], [4.5, 8, 48, 32]], np.float32),
    np.array([0.75, 0.5], np.float32),
    np.array([1, 0], np.uint16),
)
OUTPUTS = (
    *named(DETECT, BOXES, SIZE),
    *named(SEGMENT, to_runs(np.array([[0, 0, 1], [1, 1, 0]])), SIZE),
    *named(EMBED, [np.full(4, 0.5, np.float16)], SIZE),
)
ANSWER = CloudReply(((0.25, 0.75),), 0.0015, 0.25, OUTPUTS)


def sent() -> pb.InferResponse:
    return pb.InferResponse.FromString(wire.pack_answer(300, ANSWER).SerializeToString())


def signed(message: pb.InferResponse) -> pb.InferResponse:
    message.crc32 = wire.answer_checksum(message)
    return message


def test_outputs_are_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("infer_outputs_v3.bin", wire.pack_answer(300, ANSWER).SerializeToString(deterministic=True))


def test_outputs_arrive_as_they_were_sent() -> None:
    reply = wire.unpack_answer(sent(), EXPECTED)
    assert reply.probabilities == ((0.25, 0.75),)
    assert [each.name for each in reply.outputs] == [each.name for each in OUTPUTS]
    for found, wanted in zip(reply.outputs, OUTPUTS, strict=True):
        np.testing.assert_array_equal(found.array, wanted.array)
        assert found.array.dtype == wanted.array.dtype


def test_nothing_found_is_an_answer() -> None:
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.uint16)
    message = wire.pack_answer(1, CloudReply((), 0, 0, named(DETECT, none, SIZE)))
    reply = wire.unpack_answer(pb.InferResponse.FromString(message.SerializeToString()), EXPECTED[1:2])
    assert [each.array.shape for each in reply.outputs] == [(0, 4), (0,), (0,)]


@given(data=st.data())
def test_no_flipped_bit_of_an_output_is_believed(data: st.DataObject) -> None:
    message = sent()
    tensor = message.outputs[data.draw(st.integers(0, len(message.outputs) - 1))]
    raw = bytearray(tensor.data)
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    tensor.data = bytes(raw)
    with pytest.raises(InvalidReply, match="CRC-32"):
        wire.unpack_answer(message, EXPECTED)


def put(index: int, **fields: object) -> Callable[[pb.InferResponse], None]:
    """A change of the output of this index: 0 to 2 boxes, scores, classes; 3, 4 runs; 5 the vector."""

    def change(message: pb.InferResponse) -> None:
        tensor = message.outputs[index]
        for name, value in fields.items():
            if name == "shape":
                del tensor.shape[:]
                tensor.shape.extend(value)  # type: ignore[arg-type]
            else:
                setattr(tensor, name, value)

    return change


def floats(*values: float, kind: str = "<f4") -> bytes:
    return np.array(values, kind).tobytes()


WRONG: dict[str, tuple[Callable[[pb.InferResponse], None], str]] = {
    "one is missing": (lambda message: message.outputs.pop(), "5 output tensors, expected 6"),
    "one too many": (lambda message: message.outputs.add(), "7 output tensors, expected 6"),
    "another name": (put(0, name="things.secrets"), "'things.secrets', expected things.boxes"),
    "a long name": (put(0, name="é" * 10_000), "expected things.boxes"),
    "another type": (put(0, dtype=pb.DTYPE_FLOAT16), "of type 2, expected float32"),
    "a type of the future": (put(0, dtype=99), "of type 99"),
    "too many boxes": (put(0, shape=[4, 4], data=bytes(64)), r"shape \(4, 4\), expected at most \(3, 4\)"),
    "boxes of five corners": (put(0, shape=[2, 5], data=bytes(40)), r"shape \(2, 5\)"),
    "a shape of no end": (put(0, shape=[1] * 100_000), r"shape \(1, 1, 1\)"),
    "no shape": (put(0, shape=[]), r"shape \(\)"),
    "a shape without its data": (put(0, shape=[3, 4]), "32 bytes of things.boxes"),
    "more data than its shape": (put(0, data=bytes(1 << 20)), "1048576 bytes of things.boxes"),
    "a shape of gigabytes": (put(4, shape=[(1 << 32) - 1]), "expected at most"),
    "not finite": (put(0, data=floats(*[np.nan] * 8)), "not finite"),
    "infinite": (put(5, data=floats(*[np.inf] * 4, kind="<f2")), "not finite"),
    "a box outside": (put(0, data=floats(0, 0, 49, 10, 0, 0, 1, 1)), "within 48x32 pixels"),
    "a box below": (put(0, data=floats(-1, 0, 9, 10, 0, 0, 1, 1)), "within 48x32 pixels"),
    "a box inside out": (put(0, data=floats(9, 0, 3, 10, 0, 0, 1, 1)), "not corners"),
    "rising scores": (put(1, data=floats(0.5, 0.75)), "do not fall"),
    "a score above one": (put(1, data=floats(1.5, 0.5)), "do not fall"),
    "a score below the least": (put(1, data=floats(0.75, 0.1)), "do not fall"),
    "a box without a score": (put(1, shape=[1], data=floats(0.5)), "2 boxes of things, 1 scores"),
    "a class without a label": (put(2, data=np.array([2, 0], "<u2").tobytes()), "class 2 of things, which has 2"),
    "runs too short": (put(4, data=np.array([2, 1, 1], "<u4").tobytes()), "of 4 pixels, expected 6"),
    "runs too long": (put(4, data=np.array([1 << 31, 1 << 31, 6], "<u4").tobytes()), "pixels, expected 6"),
    "an empty run": (put(4, data=np.array([6, 0, 0], "<u4").tobytes()), "runs of ground"),
    "a run without a class": (put(3, shape=[2], data=bytes(4)), "runs of ground"),
    "a run of an unknown class": (put(3, data=np.array([7, 0, 0], "<u2").tobytes()), "class 7 of ground"),
    "a vector too short": (put(5, shape=[3], data=bytes(6)), r"shape \(3,\), expected \(4,\)"),
    "a vector of no length": (put(5, data=bytes(8)), "of length 0, expected 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_output_that_cannot_be_true_is_refused_by_name(case: str) -> None:
    change, words = WRONG[case]
    message = sent()
    change(message)
    with pytest.raises(InvalidReply, match=words):
        wire.unpack_answer(signed(message), EXPECTED)


def test_outputs_where_probabilities_are_expected_are_refused() -> None:
    with pytest.raises(InvalidReply, match="6 output tensors, expected 0"):
        wire.unpack_answer(sent(), [2])


@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_outputs(data: bytes) -> None:
    message = pb.InferResponse(probabilities=[0.5, 0.5])
    message.outputs.add(name="things.boxes", dtype=pb.DTYPE_FLOAT32, shape=[len(data) // 16, 4], data=data)
    with pytest.raises(InvalidReply):
        wire.unpack_answer(signed(message), EXPECTED[:2])


def test_a_tensor_is_sent_little_endian_whatever_it_was() -> None:
    big = CloudReply((), 0, 0, (OutputTensor("a", np.array([1.5], ">f4")),))
    assert wire.pack_answer(1, big).outputs[0].data == np.array([1.5], "<f4").tobytes()
