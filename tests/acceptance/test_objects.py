"""The bundle `objects` as people meet it: boxes on the page, a live view of cameras, Frigate's call, Home Assistant."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser

from tests.acceptance.browser import SCHEMES, Visit, axe_source, chromium
from tests.acceptance.test_streams import MOSQUITTO, Broker
from tests.bench.clips import clip
from tests.bench.processes import ROOT, CloudProcess, EdgeProcess, free_port
from tests.bench.proxy import LinkProxy, LinkSpec

BUNDLE = ROOT / "models" / "zoo" / "objects"
PHOTO = ROOT / "docs" / "samples" / "photo.jpg"
SHOTS = ROOT / "build" / "page"
REFUSED = "status of 400"  # what chromium's console says of a refusal, whatever the page does with it

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    """Behind 1 Mbit/s."""
    with CloudProcess(BUNDLE) as running, LinkProxy(running.port, LinkSpec(1e6, 0.05)) as link:
        yield f"127.0.0.1:{link.port}"


@pytest.fixture(scope="module")
def url(cloud: str) -> Iterator[str]:
    with EdgeProcess("--bundle", str(BUNDLE), "--cloud", cloud, "--deadline-ms", "10000") as edge:
        yield edge.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium"):
        pytest.skip("apt-get install chromium")
    with chromium() as found:
        yield found


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`edge-agent watch` of a clip at its own speed."""
    command = [sys.executable, "-m", "isthmus.edge_agent", "watch", f"street={clip()}", "--bundle", str(BUNDLE)]
    command += ["--realtime", "--fps", "2", "--deadline-ms", "10000", *arguments]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.terminate()
        running.communicate(timeout=30)


def test_boxes_are_drawn_on_a_photo(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, viewport={"width": 1280, "height": 900})
    visit.answer(PHOTO)
    assert "cat" in (visit.page.locator("#labels").text_content() or "")
    SHOTS.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=SHOTS / "boxes.png", full_page=True)
    assert visit.violations(axe_source()) == [] and visit.said == []


def test_a_refusal_is_said_on_the_page(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    visit.page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"junk"})
    visit.page.locator("#photo-message.bad").wait_for()
    assert [said for said in visit.said if REFUSED not in said] == []


def test_two_viewers_see_the_camera(browser: Browser, cloud: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    with watching("--cloud", cloud, "--page-listen", address):
        wait_for(address)
        for scheme, width in zip(SCHEMES, (1280, 390), strict=True):
            visit = Visit(browser, f"http://{address}", viewport={"width": width, "height": 900}, color_scheme=scheme)
            picture = visit.page.locator("#cameras img")
            picture.wait_for()
            first = picture.get_attribute("alt")
            visit.page.wait_for_function("(old) => document.querySelector('#cameras img').alt !== old", arg=first)
            SHOTS.mkdir(parents=True, exist_ok=True)
            visit.page.screenshot(path=SHOTS / f"cameras-{width}-{scheme}.png", full_page=True)
            assert "found" in (picture.get_attribute("alt") or "")
            assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            assert visit.violations(axe_source()) == [] and visit.said == []


def wait_for(address: str) -> None:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(f"http://{address}/healthz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the page is not served")


def test_frigate_s_call_is_answered(url: str) -> None:
    """As Frigate's deepstack plugin posts it: `api_key` and `image`, JPEG, of the detector's size."""
    found = curl(url, "-F", "api_key=", "-F", f"image=@{PHOTO};filename=image")
    best = found["predictions"][0]
    assert found["success"] and best["label"] == "cat" and best["confidence"] >= 0.4
    assert 0 <= best["x_min"] < best["x_max"] and 0 <= best["y_min"] < best["y_max"]
    assert [each["confidence"] for each in found["predictions"]] == sorted(
        (each["confidence"] for each in found["predictions"]), reverse=True
    )


def curl(url: str, *arguments: str) -> Any:
    command = ["curl", "--silent", "--show-error", *arguments, f"{url}/v1/vision/detection"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)


@pytest.mark.skipif(MOSQUITTO is None or not shutil.which("mosquitto_sub"), reason="mosquitto is not installed")
def test_mosquitto_sub_reads_boxes_and_a_device(cloud: str, tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    try:
        access = ("--mqtt", f"127.0.0.1:{broker.port}", "--mqtt-user", "agent", "--mqtt-password", "s3cret")
        with watching("--cloud", cloud, *access):
            device = read(broker, "homeassistant/sensor/#")
            line = read(broker, "isthmus/street")
    finally:
        broker.kill()
    assert device["value_template"] == "{{ value_json['answers']['objects']['detections'] | count }}"
    assert {each["label"] for each in line["answers"]["objects"]["detections"]} & {"person", "car"}


def read(broker: Broker, topic: str) -> Any:
    """The next message below the topic."""
    options = ["-h", "127.0.0.1", "-p", str(broker.port), "-u", "agent", "-P", "s3cret", "-t", topic, "-C", "1"]
    run = subprocess.run(["mosquitto_sub", *options, "-W", "60"], check=True, capture_output=True, timeout=70)
    return json.loads(run.stdout)
