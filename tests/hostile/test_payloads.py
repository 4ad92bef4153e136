"""Payloads made to hurt, through the codec of a real bundle: an error of ours or integers, never a crash or a flood."""

from __future__ import annotations

import random

import numpy as np
import pytest

from isthmus.models.errors import PayloadCorrupt, PayloadTooLarge
from isthmus.models.vision.bundle import Bundle

HOSTILE = {
    "one bit": b"\1\0\0\0",
    "all ones at the cap": b"\xff" * 4096,
    "all ones above the cap": b"\xff" * 4100,
    "sixteen megabytes": b"\1" * (16 << 20),
    "zeros": bytes(64),
    "text": b"GET / HTTP/1.1\r\n\r\n!!",
    "half a word": b"\1\2",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_payloads_are_refused(tiny_bundle: Bundle, data: bytes) -> None:
    with pytest.raises((PayloadCorrupt, PayloadTooLarge)):
        tiny_bundle.codec(0).decode(data, 0)


def test_no_flipped_bit_leaves_the_tables(tiny_bundle: Bundle) -> None:
    codec, rng = tiny_bundle.codec(1), random.Random(0)
    latent_CHW = np.random.default_rng(0).normal(size=codec.shape_CHW).astype(np.float32)
    good = codec.encode(codec.quantise(latent_CHW, 1), 1)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert codec.encode(codec.decode(bytes(data), 1), 1) == data
        except PayloadCorrupt:
            refused += 1
    assert refused > 0
