"""Matrices in 8 and 4 bits, and how a bundle stores them: groups of 32 weights along a row share a scale.

NumPy alone: device and cloud both read them. Shape legend: O rows, I columns, G = I / 32 groups, B = 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

BLOCK = 32  # weights that share a scale

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantise8(weight_OI: Floats) -> tuple[Bytes, Floats]:
    """Codes (O, I / 32, 32) around 128 and scales (O, I / 32). Raises BundleError unless 32 divides I."""
    blocks_OGB = in_blocks(weight_OI)
    scale_OG = np.maximum(np.abs(blocks_OGB).max(-1) / 127, 1e-12).astype(np.float32)
    codes_OGB = (np.rint(blocks_OGB / scale_OG[..., None]) + 128).astype(np.uint8)
    return codes_OGB, scale_OG


def quantise4(weight_OI: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Packed codes (O, I / 32, 16), scales (O, I / 32) and packed zero points (O, ceil(I / 64))."""
    blocks_OGB = in_blocks(weight_OI)
    low_OG, high_OG = np.minimum(blocks_OGB.min(-1), 0), np.maximum(blocks_OGB.max(-1), 0)
    scale_OG = np.maximum((high_OG - low_OG) / 15, 1e-12).astype(np.float32)
    zero_OG = np.clip(np.rint(-low_OG / scale_OG), 0, 15)
    codes_OGB = np.clip(np.rint(blocks_OGB / scale_OG[..., None] + zero_OG[..., None]), 0, 15).astype(np.uint8)
    return in_pairs(codes_OGB), scale_OG, in_pairs(zero_OG.astype(np.uint8))


def in_blocks(weight_OI: Floats) -> Floats:
    rows, columns = weight_OI.shape
    if columns % BLOCK:
        raise BundleError(f"a matrix has {columns} columns, 8- and 4-bit weights need a multiple of {BLOCK}")
    return weight_OI.reshape(rows, columns // BLOCK, BLOCK)


def in_pairs(codes: Bytes) -> Bytes:
    """Two 4-bit codes a byte along the last axis, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def packed(weight_OI: Floats, name: str) -> dict[str, NDArray[Any]]:
    """A matrix in 4 bits as a bundle stores it: of 32 weights each the codes in pairs, scale and zero point."""
    codes, scale_OG, zero = quantise4(weight_OI)
    return {f"{name}.codes": codes, f"{name}.scale": scale_OG.astype(np.float16), f"{name}.zero": zero}


def unpacked(tensors: Mapping[str, NDArray[Any]], name: str) -> Floats:
    """The matrix that `packed` stored. Raises BundleError."""
    scale_OG = matrix(tensors, f"{name}.scale", 2)
    rows, groups = scale_OG.shape
    shapes = {"codes": (rows, groups, BLOCK // 2), "zero": (rows, -(-groups // 2))}
    halves = []
    for part, shape in shapes.items():
        pairs = tensors.get(f"{name}.{part}")
        if pairs is None or pairs.dtype != np.uint8 or pairs.shape != shape:
            raise BundleError(f"tensor {name}.{part} is missing or not uint8 of shape {shape}")
        halves.append(np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*shape[:-1], -1))
    codes_OGB, zero_OG = halves[0].astype(np.float32), halves[1][:, :groups].astype(np.float32)
    weight_OI: Floats = ((codes_OGB - zero_OG[..., None]) * scale_OG[..., None]).reshape(rows, -1)
    return weight_OI


def packed8(weight_OI: Floats, name: str) -> dict[str, NDArray[Any]]:
    """A matrix in 8 bits as a bundle stores it: of 32 weights each the codes and a scale."""
    codes_OGB, scale_OG = quantise8(weight_OI)
    return {f"{name}.codes": codes_OGB, f"{name}.scale": scale_OG.astype(np.float16)}


def unpacked8(tensors: Mapping[str, NDArray[Any]], name: str) -> Floats:
    """The matrix that `packed8` stored. Raises BundleError."""
    scale_OG, codes_OGB = matrix(tensors, f"{name}.scale", 2), tensors.get(f"{name}.codes")
    shape = (*scale_OG.shape, BLOCK)
    if codes_OGB is None or codes_OGB.dtype != np.uint8 or codes_OGB.shape != shape:
        raise BundleError(f"tensor {name}.codes is missing or not uint8 of shape {shape}")
    weight_OI: Floats = ((codes_OGB.astype(np.float32) - 128) * scale_OG[..., None]).reshape(len(scale_OG), -1)
    return weight_OI


def matrix(tensors: Mapping[str, NDArray[Any]], name: str, axes: int) -> Floats:
    """A float tensor of a bundle. Raises BundleError."""
    array = tensors.get(name)
    if array is None or array.ndim != axes or array.dtype not in (np.float16, np.float32) or not math.prod(array.shape):
        found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
        raise BundleError(f"tensor {name} is {found}, expected floats with {axes} axes")
    floats: Floats = array.astype(np.float32)
    return floats
