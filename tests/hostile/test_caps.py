"""Photos made to cost bytes: whatever the pixels, no payload is over the bundle's cap, and every photo is answered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.transport.exchanges import Exchange
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.models.bundle.files import write_bundle
from isthmus.models.messages import CloudReply, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Manifest
from tests.fake_link import AnyLink, Asked
from tests.tiny_bundle import SIDE

CAP = 120  # bytes: over what a plain photo costs at the cheapest rate, under what a costly one does
WAYS = [("light", 0.5), ("light", 1.0), ("deep", 1.0)]
STEPS = 120

Pixels = NDArray[np.uint8]


def patterns() -> dict[str, Pixels]:
    """What is known to cost codecs dear, and what lies at the ends of the range."""
    rng = np.random.default_rng(0)
    down, across = np.mgrid[0:SIDE, 0:SIDE]
    boards = {f"checkerboard {n}": ((down // n + across // n) % 2 * 255)[..., None].repeat(3, 2) for n in (1, 2, 4, 8)}
    found = {
        "black": np.zeros((SIDE, SIDE, 3)),
        "white": np.full((SIDE, SIDE, 3), 255),
        "noise": rng.integers(0, 256, (SIDE, SIDE, 3)),
        "two-valued noise": rng.integers(0, 2, (SIDE, SIDE, 3)) * 255,
        "coarse noise": rng.integers(0, 2, (SIDE // 8, SIDE // 8, 3)).repeat(8, 0).repeat(8, 1) * 255,
        "one white pixel": np.eye(SIDE)[..., None].repeat(3, 2) * 255,
        "stripes": (across % 3 == 0)[..., None] * np.array([255, 0, 255]),
        **boards,
    }
    return {name: pixels.astype(np.uint8) for name, pixels in found.items()}


class Recorder(AnyLink):
    """Answers everything, and remembers what it was given."""

    def __init__(self) -> None:
        self.payloads: list[Payload] = []

    def answer(self, asked: Asked) -> Exchange:
        self.payloads.append(asked.payload)
        return Exchange(CloudReply(((0.25, 0.75),), 0.0, 0.0), len(asked.payload.data), 20, 0.01)


@pytest.fixture(scope="module")
def capped(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a cap that costly photos meet."""
    content = tiny_bundle.manifest.model_dump(mode="json", exclude={"files", "fingerprint", "schema_version"})
    for tap in content["taps"]:
        tap["max_payload_bytes"] = CAP
    files = {name: tiny_bundle.read(name) for name in tiny_bundle.manifest.files}
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("capped") / "tiny", content, files, Manifest))


@pytest.fixture
def agent(capped: Bundle) -> Iterator[EdgeAgent]:
    with EdgeAgent(EdgeConfig(capped.folder, threads=1, deadline_s=30.0)) as made:
        made.replicas = Replicas([Recorder()])  # type: ignore[list-item]
        yield made


def recorder(agent: EdgeAgent) -> Recorder:
    (link,) = agent.replicas
    assert isinstance(link, Recorder)
    return link


@pytest.mark.parametrize(("tap", "width"), WAYS)
def test_no_pattern_is_sent_above_the_cap(agent: EdgeAgent, tap: str, width: float) -> None:
    top = 2 if tap == "light" else 1
    answers = [agent.infer(Image.fromarray(p), tap=tap, width=width, rate=top) for p in patterns().values()]
    sizes = [len(payload.data) for payload in recorder(agent).payloads]
    assert max(sizes) <= CAP
    sent = [answer for answer in answers if answer.route == "split"]
    assert all((answer.tap, answer.width) == (tap, width) for answer in sent)
    assert min(answer.rate for answer in sent if answer.rate is not None) < top, "the cap was met by none of them"
    for answer in answers:
        assert answer.route == "split" or (answer.degraded and "the bundle's cap is 120" in answer.why)


def cost(agent: EdgeAgent, pixels: Pixels, tap: str, width: float) -> int:
    """Bytes that a photo would have at the dearest rate if there were no cap."""
    index, top = (0, 2) if tap == "light" else (1, 1)
    codec = agent._codecs[index]
    codec.max_bytes, cap = 1 << 20, codec.max_bytes
    try:
        agent.infer(Image.fromarray(pixels), tap=tap, width=width, rate=top)
        return len(recorder(agent).payloads.pop().data)
    finally:
        codec.max_bytes = cap


@pytest.mark.parametrize(("tap", "width"), WAYS)
def test_a_search_for_the_costliest_photo_does_not_get_past_the_cap(agent: EdgeAgent, tap: str, width: float) -> None:
    """Ascent without gradients: blocks are painted at random, and kept where that costs more."""
    rng = np.random.default_rng(1)
    best = max(patterns().values(), key=lambda pixels: cost(agent, pixels, tap, width))
    start = highest = cost(agent, best, tap, width)
    for _ in range(STEPS):
        tried, size = best.copy(), int(rng.choice([4, 8, 16]))
        y, x = rng.integers(0, SIDE - size + 1, 2)
        tried[y : y + size, x : x + size] = rng.choice(np.array([0, 255], np.uint8), (1, 1, 3))
        if (found := cost(agent, tried, tap, width)) > highest:
            best, highest = tried, found
    assert highest > max(CAP, start)
    for rate in range(2):
        answer = agent.infer(Image.fromarray(best), tap=tap, width=width, rate=rate)
        assert answer.route == "split" or (answer.degraded and "cap" in answer.why)
    assert all(len(payload.data) <= CAP for payload in recorder(agent).payloads)
