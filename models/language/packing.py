"""Quantise matrices block by block along a row: to 8 or 4 bits for computing, and to 2 to 8 bits for storage.

Shape legend: O rows, I columns, G groups, B weights of a group. NumPy only, since device and cloud both use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError

BLOCK = 32  # weights that share a scale, for computing
STORED_BLOCK = 64  # weights that share a scale in a bundle
CLIP_FACTORS = (
    1.0,
    0.9,
    0.8,
    0.7,
    0.6,
)  # candidates for the value of the outermost level, as a share of a block's largest weight

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


def quantise_symmetric4(weight_OI: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """Packed codes (O, I / 64, 32) and scales (O, I / 64): weight = scale * (code - 8), as a model is stored in 4 bits.

    The largest weight of a block, which sets the scale and its sign, has code 0. Raises BundleError unless 64 divides
    I.
    """
    blocks_OGB = in_blocks(weight_OI, STORED_BLOCK)
    low_OG, high_OG = blocks_OGB.min(-1), blocks_OGB.max(-1)
    scale_OG = (np.where(high_OG > -low_OG, high_OG, low_OG) / -8).astype(np.float16)
    divisor_OG1 = np.where(scale_OG == 0, 1, scale_OG).astype(np.float32)[..., None]
    return in_pairs(np.clip(np.rint(blocks_OGB / divisor_OG1) + 8, 0, 15).astype(np.uint8)), scale_OG


def in_blocks(weight_OI: Floats, size: int = BLOCK) -> Floats:
    """Blocks (O, I / size, size). Raises BundleError unless `size` divides I."""
    rows, columns = weight_OI.shape
    if columns % size:
        raise BundleError(f"a matrix has {columns} columns, quantisation needs a multiple of {size}")
    return weight_OI.reshape(rows, columns // size, size)


def in_pairs(codes: Bytes) -> Bytes:
    """Pack two 4-bit codes into a byte along the last axis, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def from_pairs(pairs: Bytes) -> Bytes:
    """The inverse of `in_pairs`, for an even number of codes."""
    return np.asarray(np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1), np.uint8)


def packed(weight_OI: Floats, name: str, bits: int) -> dict[str, NDArray[Any]]:
    """A matrix as a bundle stores it: `name`.codes of `bits` (2 to 8) bits, and one `name`.scale a block.

    A weight is scale * (code - (2 ** bits - 1) / 2). No level is zero, so that all levels are used equally; a block of
    zeros has scale 0. Of the CLIP_FACTORS, the one with the least squared error sets the scale of each block. Raises
    BundleError unless STORED_BLOCK divides I.
    """
    blocks_OGB = in_blocks(weight_OI, STORED_BLOCK)
    middle = (2**bits - 1) / 2
    largest_OG = np.abs(blocks_OGB).max(-1)
    best_OG, scale_OG = np.full_like(largest_OG, np.inf), np.zeros_like(largest_OG)
    for share in CLIP_FACTORS:
        tried_OG = (largest_OG * share / middle).astype(np.float16).astype(np.float32)
        signed_OGB = nearest_codes(blocks_OGB, tried_OG, bits) - middle
        error_OG = np.square(signed_OGB * tried_OG[..., None] - blocks_OGB).sum(-1)
        scale_OG = np.where(error_OG < best_OG, tried_OG, scale_OG)
        best_OG = np.minimum(error_OG, best_OG)
    codes_OGB = nearest_codes(blocks_OGB, scale_OG, bits).astype(np.uint8)
    bits_OGK = np.unpackbits(codes_OGB[..., None], axis=-1)[..., 8 - bits :].reshape(*scale_OG.shape, -1)
    return {f"{name}.codes": np.packbits(bits_OGK, axis=-1), f"{name}.scale": scale_OG.astype(np.float16)}


def nearest_codes(blocks_OGB: Floats, scale_OG: Floats, bits: int) -> Floats:
    """The nearest code for each weight."""
    steps_OGB = blocks_OGB / np.maximum(scale_OG, 1e-12)[..., None]
    return np.asarray(np.clip(np.rint(steps_OGB + (2**bits - 1) / 2), 0, 2**bits - 1), np.float32)


def unpacked(tensors: Mapping[str, NDArray[Any]], name: str) -> Floats:
    """The inverse of `packed`. Raises BundleError."""
    scale_OG, codes = matrix(tensors, f"{name}.scale", 2), tensors.get(f"{name}.codes")
    if codes is None or codes.dtype != np.uint8 or codes.ndim != 3 or codes.shape[:2] != scale_OG.shape:
        raise BundleError(f"tensor {name}.codes is missing or not uint8 of shape {(*scale_OG.shape, 'bytes')}")
    bits, rest = divmod(codes.shape[2] * 8, STORED_BLOCK)
    if rest or not 2 <= bits <= 8:
        raise BundleError(f"tensor {name}.codes has {codes.shape[2]} bytes a block, expected 8 for each of 2 to 8 bits")
    bits_OGBK = np.unpackbits(codes, axis=-1).reshape(*scale_OG.shape, STORED_BLOCK, bits)
    codes_OGB = np.packbits(bits_OGBK, axis=-1)[..., 0] >> (8 - bits)
    weights_OGB = (codes_OGB.astype(np.float32) - (2**bits - 1) / 2) * scale_OG[..., None]
    return np.asarray(weights_OGB.reshape(len(scale_OG), -1), np.float32)


def matrix(tensors: Mapping[str, NDArray[Any]], name: str, axes: int) -> Floats:
    """A float tensor of a bundle as float32. Raises BundleError when it is missing, of another type or shape."""
    array = tensors.get(name)
    if array is None or array.ndim != axes or array.dtype not in (np.float16, np.float32) or not math.prod(array.shape):
        found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
        raise BundleError(f"tensor {name} is {found}, expected floats with {axes} axes")
    floats: Floats = array.astype(np.float32)
    return floats
