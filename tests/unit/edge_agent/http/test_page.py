from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from isthmus.edge_agent.http.app import create_app

PARTS = ("page.css", "page.js", "dom.js", "photo.js", "chat.js", "state.js", "icon.svg")
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(CollectorRegistry()), base_url="http://localhost")


def test_the_page_has_a_strict_policy(client: TestClient) -> None:
    reply = client.get("/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(each.split(" ", 1) for each in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_the_page_has_nothing_inline_and_nothing_of_another_host(client: TestClient) -> None:
    text = client.get("/").text + "".join(client.get(f"/page/{name}").text for name in PARTS)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:|innerHTML", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', text):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("name", PARTS)
def test_its_parts_are_sent_as_what_they_are(client: TestClient, name: str) -> None:
    reply = client.get(f"/page/{name}")
    assert (reply.status_code, reply.headers["x-content-type-options"]) == (200, "nosniff")
    assert reply.headers["content-type"].startswith(KINDS[name.rpartition(".")[2]])


def test_what_the_client_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/page.css")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/page.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/page.css", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/routes.py",
        "/page/..%2froutes.py",
        "/page/%2e%2e/routes.py",
        "/page/..%5croutes.py",
        "/page/static/page.css",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/page.css%00",
        "/page/index",
    ],
)
def test_no_path_leads_out_of_the_folder(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == 404


def test_the_page_cannot_be_written_and_is_guarded_as_all_paths(client: TestClient) -> None:
    assert client.post("/").status_code == 405
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
