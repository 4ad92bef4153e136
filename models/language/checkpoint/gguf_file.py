"""The GGUF container: keys with values, and tensors by name, read through a memory map.

The header is parsed here instead of by `gguf.GGUFReader`, which trusts every count in the file (an array of 2**60
elements exhausts the memory) and needs seconds for a vocabulary. Types and dequantisation are gguf's. Knows nothing
about models.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, quants
from numpy.typing import NDArray

from isthmus.models.errors import BundleError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 4096  # published files have about a hundred
MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 22  # of one array in the header; a vocabulary has at most 2**20 tokens
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20  # bytes
SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
KIND_NAMES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KINDS = {GGMLQuantizationType[name] for name in KIND_NAMES}  # types that gguf dequantises and published models use


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place in the file: `offset` and `size` in bytes, `shape` with the contiguous dimension last."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """An opened file: `fields` by key, `tensors` by name. Every tensor lies inside the file."""

    def __init__(self, path: Path) -> None:
        """Raises BundleError."""
        self._data = map_file(path)
        cursor = _Cursor(self._data)
        tensors, self.fields = _keys(cursor, path.name)
        headers = [_tensor_header(cursor) for _ in range(tensors)]
        self.tensors = _locate(headers, cursor.at, self._alignment(), len(self._data))

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A read-only view of a tensor's stored rows (..., bytes of a row)."""
        stored = self.tensors[name]
        flat = self._data[stored.offset : stored.offset + stored.size]
        return flat.reshape(*stored.shape[:-1], -1)

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor dequantised to a new float32 array of its shape."""
        stored = self.tensors[name]
        with np.errstate(over="ignore", invalid="ignore"):
            values = quants.dequantize(self.bytes_of(name), stored.kind)
        return np.array(values, np.float32).reshape(stored.shape)

    def _alignment(self) -> int:
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise BundleError("GGUF header: general.alignment is not a power of two up to 2**20")
        return alignment


def read_fields(path: Path) -> dict[str, Any]:
    """The keys of a file that need not hold the tensors it names. Raises BundleError."""
    return _keys(_Cursor(map_file(path)), path.name)[1]


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file's bytes as a read-only memory map. Raises BundleError for a file that is missing, empty or unreadable."""
    try:
        if not path.is_file():
            raise BundleError(f"{path.name}: no such file")
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path.name}: empty or cannot be read") from error


class _Cursor:
    """Reads a header sequentially. Raises BundleError at its end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data.data
        self.at = 0

    def read(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise BundleError(f"GGUF header: truncated, {size} bytes expected at {self.at} of {len(self._data)}")
        self.at += size
        return bytes(self._data[self.at - size : self.at])

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.read(struct.calcsize("<" + code)))[0]

    def count(self, limit: int, item_bytes: int, what: str) -> int:
        """Read the number of items that follow, each of at least `item_bytes`."""
        count: int = self.scalar("Q")
        if count > limit or count * item_bytes > len(self._data) - self.at:
            raise BundleError(f"GGUF header: {count} {what}, more than the file holds or over {limit}")
        return count

    def text(self) -> str:
        try:
            return self.read(self.scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"GGUF header: text before byte {self.at} is not UTF-8") from error

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_code(kind))
        if (kind := self.scalar("I")) == GGUFValueType.STRING:
            return [self.text() for _ in range(self.count(MAX_ELEMENTS, 8, "strings"))]
        code = _code(kind)
        count = self.count(MAX_ELEMENTS, struct.calcsize("<" + code), "elements")
        return list(struct.unpack(f"<{count}{code}", self.read(count * struct.calcsize("<" + code))))


def _keys(cursor: _Cursor, where: str) -> tuple[int, dict[str, Any]]:
    """The number of tensors, and the values by key."""
    if cursor.read(4) != MAGIC:
        raise BundleError(f"{where}: not a GGUF file, it does not begin with {MAGIC.decode()}")
    if (version := cursor.scalar("I")) not in VERSIONS:
        raise BundleError(f"{where}: GGUF version {version} or big-endian, this program reads {VERSIONS}")
    tensors, fields = cursor.count(MAX_TENSORS, 8, "tensors"), dict[str, Any]()
    for _ in range(cursor.count(MAX_KEYS, 8, "keys")):
        key = cursor.text()
        if key in fields:
            raise BundleError(f"GGUF header: key {key[:100]} occurs twice")
        fields[key] = cursor.value()
    return tensors, fields


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise BundleError(f"GGUF header: value type {kind} is unknown, or an array of arrays")
    return SCALARS[GGUFValueType(kind)]


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape, kind, and offset from the start of the data."""
    name = cursor.text()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise BundleError(f"GGUF header: tensor {name[:100]} has {dimensions} dimensions, expected 1 to 4")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    code, offset = cursor.scalar("I"), cursor.scalar("Q")
    if code not in KINDS:
        supported = ", ".join(KIND_NAMES)
        raise BundleError(f"GGUF header: tensor {name[:100]} is of type {code}, this program reads {supported}")
    return name, shape, GGMLQuantizationType(code), offset


def _locate(
    headers: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], end: int, alignment: int, file_bytes: int
) -> dict[str, GgufTensor]:
    """Each tensor's place; the data begin at the first aligned byte after the header's `end`."""
    start = -(-end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in headers:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        if name in tensors or size == 0 or shape[-1] % block or offset % alignment:
            raise BundleError(f"GGUF header: tensor {name[:100]} is doubled, empty, unaligned or not whole blocks")
        if start + offset + size > file_bytes:
            raise BundleError(f"GGUF file: truncated, tensor {name[:100]} would end at byte {start + offset + size}")
        tensors[name] = GgufTensor(shape, kind, start + offset, size)
    return tensors
