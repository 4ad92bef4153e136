"""The agent's page in a real browser; screenshots are written to build/page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser

from tests.acceptance.browser import FIRST_PAINT, SCHEMES, WIDTHS, Visit, axe_source, chromium
from tests.bench.processes import ROOT, CloudProcess, EdgeProcess

PHOTO = ROOT / "docs" / "samples" / "photo.jpg"
SHOTS = ROOT / "build" / "page"

pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="apt-get install chromium"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    bundle = ROOT / "models" / "zoo" / "photos"
    with CloudProcess(bundle, arguments=("--model", "smollm2")) as cloud:
        arguments = ("--bundle", str(bundle), "--model", "smollm2", "--cloud", cloud.target)
        with EdgeProcess(*arguments) as edge:
            yield edge.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def test_it_paints_at_once_and_asks_no_other_host(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    assert visit.page.evaluate(FIRST_PAINT) <= 1000
    assert visit.hosts == {url.removeprefix("http://")}
    assert visit.said == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_photo_and_a_prompt_are_answered_without_a_violation(
    browser: Browser, url: str, width: int, scheme: str
) -> None:
    visit = Visit(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit.answer(PHOTO)
    assert visit.page.locator("#labels li").count() == 5
    assert visit.page.locator("#route").text_content()
    assert visit.page.locator("#ways tbody tr").count()
    visit.ask("What is the capital of France?")
    assert "Paris" in (visit.page.locator("#messages").text_content() or "")
    assert visit.page.locator("#messages span[class]").count()
    assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    SHOTS.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=SHOTS / f"{width}-{scheme}.png", full_page=True)
    assert visit.violations(axe_source()) == []
    assert visit.said == []


def test_a_photo_of_the_webcam_is_answered_from_the_keyboard(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, permissions=["camera"])
    visit.page.locator("#webcam").press("Enter")
    visit.page.locator("#camera").wait_for()
    visit.page.locator("#shoot").press("Enter")
    visit.page.locator("#answer").wait_for()
    visit.page.locator("#close").press("Enter")
    assert visit.page.locator("#camera").is_hidden()
    assert visit.said == []


def test_a_file_that_is_no_photo_is_said_to_be_none(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    visit.page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"junk"})
    message = visit.page.locator("#photo-message.bad")
    message.wait_for()
    assert "not a readable" in (message.text_content() or "")
    assert visit.page.locator("#answer").is_hidden()
