"""What a real agent sends, counted on the wire: nothing of private photos, and never more than its budgets allow."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.edge_agent.spending import Budgets
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import CloudProcess, EdgeProcess
from tests.bench.proxy import LinkProxy, LinkSpec

SETUP_BYTES = 24_000  # of one connection both ways: HTTP/2's set-up, and the probes that measure the link
MESSAGE_BYTES = 400  # of HTTP/2 around one photo and its reply: headers, windows, pings


@pytest.fixture
def proxy(cloud: CloudProcess) -> Iterator[LinkProxy]:
    with LinkProxy(cloud.port, LinkSpec(rate_bps=None, rtt_s=0.0)) as proxy:
        yield proxy


@pytest.fixture
def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def moved(proxy: LinkProxy) -> int:
    return proxy.up.bytes + proxy.down.bytes


def quiet(proxy: LinkProxy) -> int:
    """Bytes moved when nothing of the connection's set-up has been under way for a while."""
    before = -1
    while before != moved(proxy):
        before = moved(proxy)
        time.sleep(0.3)
    return before


@pytest.mark.parametrize("mode", ["auto", "offload", "split"])
def test_private_photos_move_no_byte(
    proxy: LinkProxy, new_agent: Callable[..., EdgeAgent], photo: Image.Image, mode: str
) -> None:
    agent = new_agent(f"127.0.0.1:{proxy.port}", mode=mode, deadline_s=5.0)
    assert agent.replicas.best() is not None
    before = quiet(proxy)
    answers = [agent.infer(photo, private=True) for _ in range(20)]
    assert moved(proxy) == before
    assert {(answer.bytes_up, answer.degraded) for answer in answers} == {(0, False)}
    assert all(answer.route == "exit" or "private" in answer.why for answer in answers)
    if mode != "auto":
        agent.infer(photo)
        assert moved(proxy) > before, "others are sent"


def infer(url: str, png: bytes) -> dict[str, object]:
    request = urllib.request.Request(f"{url}/v1/infer?deadline_ms=5000", data=png, method="POST")
    with urllib.request.urlopen(request, timeout=30) as reply:
        answer: dict[str, object] = json.loads(reply.read())
        return answer


def test_an_agent_that_is_killed_again_and_again_never_overspends(
    cloud: CloudProcess, proxy: LinkProxy, tiny_bundle: Bundle, png: bytes, tmp_path: Path
) -> None:
    """A tenth of 60 calls an hour may be made at once, and one comes in every minute or so."""
    served, started_s = cloud.metric("requests_total", method="InferStream"), time.monotonic()
    arguments = (
        "--bundle", str(tiny_bundle.folder), "--cloud", f"127.0.0.1:{proxy.port}", "--mode", "split", "--threads", "1",
        "--budget-calls-per-hour", "60", "--ledger", str(tmp_path / "ledger.db"),
    )  # fmt: skip
    routes: list[object] = []
    for photos in (3, 2, 6):
        with EdgeProcess(*arguments) as edge:
            answers = [infer(edge.url, png) for _ in range(photos)]
            routes += [answer["route"] for answer in answers]
            os.kill(edge.process.pid, signal.SIGKILL)
            edge.process.wait()
    allowed = 6 + (time.monotonic() - started_s) / 60
    assert 5 <= cloud.metric("requests_total", method="InferStream") - served <= allowed
    assert routes[-1] == "fallback" and "the budget of calls has" in str(answers[-1]["why"])
    assert answers[-1]["degraded"] is True


def test_bytes_on_the_wire_stay_within_the_budget_and_its_framing(
    proxy: LinkProxy, new_agent: Callable[..., EdgeAgent], photo: Image.Image, tmp_path: Path
) -> None:
    """The budget is of whole messages: what HTTP/2 adds is bounded by the number of messages."""
    limit = 40_000.0
    agent = new_agent(
        f"127.0.0.1:{proxy.port}", mode="split", deadline_s=5.0, budgets=Budgets(bytes_day=limit),
        ledger=tmp_path / "ledger.db",
    )  # fmt: skip
    answers = [agent.infer(photo) for _ in range(60)]
    sent = [answer for answer in answers if answer.route == "split"]
    messages = sum(answer.bytes_up + answer.bytes_down for answer in answers)
    assert sent and len(sent) < 60 and all(answer.route == "fallback" for answer in answers if answer not in sent)
    assert messages <= limit / 10 + 1, "what may be spent at once"
    assert moved(proxy) <= messages + SETUP_BYTES + MESSAGE_BYTES * len(sent)
