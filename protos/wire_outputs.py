"""Convert output tensors to and from protobuf. Knows no task: what a tensor must be comes as OutputBounds.

    OutputTensor -> pack_tensor -> Tensor ~~~ Tensor, OutputBounds -> unpack_outputs -> OutputTensor

Name, type, shape and size are checked before anything is allocated; what is unpacked views the message's bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import InvalidReply
from isthmus.models.messages import OutputBounds, OutputTensor, TensorBound
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

DTYPES: dict[str, pb.DType.ValueType] = {  # by the names of messages.DTypeName
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "uint16": pb.DTYPE_UINT16,
    "uint32": pb.DTYPE_UINT32,
}
SHOWN = 80  # characters of a name, in an error


def pack_tensor(tensor: OutputTensor) -> pb.Tensor:
    dtype = tensor.array.dtype
    data = tensor.array.astype(dtype.newbyteorder("<"), copy=False).tobytes()
    return pb.Tensor(name=tensor.name, dtype=DTYPES[dtype.name], shape=tensor.array.shape, data=data)


def unpack_outputs(messages: Sequence[pb.Tensor], expected: Sequence[OutputBounds]) -> tuple[OutputTensor, ...]:
    """The tensors of the tasks in order. Raises InvalidReply unless there are exactly those, within their bounds."""
    bounds = [bound for each in expected for bound in each.tensors]
    if len(messages) != len(bounds):
        raise InvalidReply(f"the cloud sent {len(messages)} output tensors, expected {len(bounds)}")
    arrays = [unpack_tensor(message, bound) for message, bound in zip(messages, bounds, strict=True)]
    rest = iter(arrays)
    for each in expected:
        try:
            each.check([next(rest) for _ in each.tensors])
        except ValueError as error:
            raise InvalidReply(f"the cloud sent {error}") from error
    return tuple(OutputTensor(bound.name, array) for bound, array in zip(bounds, arrays, strict=True))


def unpack_tensor(message: pb.Tensor, bound: TensorBound) -> NDArray[Any]:
    """Read-only. Raises InvalidReply unless it is what `bound` allows, and finite."""
    if message.name != bound.name:
        raise InvalidReply(f"the cloud sent an output {message.name[:SHOWN]!a}, expected {bound.name}")
    if message.dtype != DTYPES[bound.dtype]:
        raise InvalidReply(f"the cloud sent {bound.name} of type {message.dtype}, expected {bound.dtype}")
    shape = tuple(message.shape[: len(bound.shape) + 1])
    if len(shape) != len(bound.shape) or not fits(shape, bound):
        most = "at most " if bound.at_most else ""
        raise InvalidReply(f"the cloud sent {bound.name} of shape {shape}, expected {most}{bound.shape}")
    dtype = np.dtype(bound.dtype).newbyteorder("<")
    if len(message.data) != math.prod(shape) * dtype.itemsize:
        raise InvalidReply(f"the cloud sent {len(message.data)} bytes of {bound.name}, its shape is {shape}")
    array = np.frombuffer(message.data, dtype).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidReply(f"the cloud sent {bound.name} with values that are not finite")
    return array


def fits(shape: Sequence[int], bound: TensorBound) -> bool:
    first = shape[0] <= bound.shape[0] if bound.at_most else shape[0] == bound.shape[0]
    return first and tuple(shape[1:]) == bound.shape[1:]


def outputs_checksum(messages: Sequence[pb.Tensor], crc32: int) -> int:
    """`crc32` continued over the tensors; unchanged where there are none."""
    for message in messages:
        name = message.name.encode()
        sizes = (len(name), message.dtype, len(message.shape), *message.shape, len(message.data))
        head = struct.pack(f"<{len(sizes)}I", *(size & 0xFFFFFFFF for size in sizes))
        crc32 = zlib.crc32(message.data, zlib.crc32(name, zlib.crc32(head, crc32)))
    return crc32
