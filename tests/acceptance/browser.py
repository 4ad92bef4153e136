"""A real browser on the page of an agent: Debian's chromium, driven by playwright, and axe-core from npm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.bench.processes import ROOT

AXE = "axe-core@4.14.1"
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)
FIRST_PAINT = """() => new Promise((done) => {
  const found = performance.getEntriesByName("first-contentful-paint")[0];
  if (found) return done(found.startTime);
  new PerformanceObserver((list) => done(list.getEntriesByName("first-contentful-paint")[0].startTime))
    .observe({ type: "paint", buffered: true });
})"""


def axe_source() -> str:
    """The script of axe-core, fetched into build/ once."""
    folder = ROOT / "build" / "axe"
    script = folder / "package" / "axe.min.js"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, text=True)
        shutil.unpack_archive(folder / run.stdout.split()[-1], folder)
    return script.read_text()


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, with a webcam that is made up."""
    options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page that is open, and what its console said."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        """`options` are those of a browser context. The page's policy holds for the page, not for axe."""
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda each: self.said.append(each.text) if each.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("requestfailed", lambda request: self.said.append(f"{request.url} failed"))
        self.hosts: set[str] = set()
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(url)
        self.page.locator("#facts dt").first.wait_for()

    def answer(self, photo: Path) -> None:
        """Give the page a photo, and wait for its answer."""
        self.page.locator("#file").set_input_files(photo)
        self.page.locator("#answer").wait_for()

    def ask(self, question: str) -> None:
        """Ask the chat from the keyboard, and wait for the end of the answer."""
        self.page.locator("#prompt").fill(question)
        self.page.locator("#prompt").press("Enter")
        self.page.locator("#messages small").last.wait_for(timeout=120_000)

    def violations(self, axe: str) -> list[str]:
        """What axe finds, as RULE: ELEMENT."""
        self.page.evaluate(axe)
        found = self.page.evaluate("() => axe.run()")["violations"]
        return [f"{rule['id']}: {node['html'][:100]}" for rule in found for node in rule["nodes"]]
