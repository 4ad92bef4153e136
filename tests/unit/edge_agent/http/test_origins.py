from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from isthmus.edge_agent.http.origins import OriginPolicy

LOCAL = OriginPolicy("127.0.0.1:8080", ())
NAMED = OriginPolicy("0.0.0.0:8080", ("Camera.example", "edge"))
OPEN = OriginPolicy("0.0.0.0:8080", ())


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST.",
        "127.0.0.1:8080",
        "127.0.0.1",
        "[::1]:8080",
        "[::1]",
        "x.localhost:80",
    ],
)
def test_a_loopback_agent_answers_to_its_own_names(host: str) -> None:
    assert LOCAL.refusal("POST", Headers({"host": host})) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8080", "camera.example", "", "127.0.0.1.evil"]
)
def test_another_name_is_refused_for_every_method(host: str) -> None:
    for method in ("GET", "POST"):
        assert "is not a name of this agent" in str(LOCAL.refusal(method, Headers({"host": host})))


def test_every_one_of_several_host_headers_counts() -> None:
    several = Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")])
    assert LOCAL.refusal("GET", several)


def test_names_can_be_allowed() -> None:
    for host, fine in (("camera.example:80", True), ("edge:8080", True), ("10.0.0.7", True), ("evil.example", False)):
        assert (NAMED.refusal("GET", Headers({"host": host})) is None) is fine
    assert OPEN.refusal("GET", Headers({"host": "evil.example"})) is None
    assert OriginPolicy("box:8080", ("x",)).refusal("GET", Headers({"host": "box:8080"})) is None


def test_a_page_whose_name_was_pointed_at_the_device_is_refused_without_allowed_names_too() -> None:
    page = {"host": "evil.example", "origin": "http://evil.example"}
    assert "is not a name of this agent" in str(OPEN.refusal("POST", Headers(page)))
    assert OPEN.refusal("POST", Headers({"host": "10.0.0.7:8080", "origin": "http://10.0.0.7:8080"})) is None


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({}, True),  # no browser
        ({"origin": "http://localhost:8080"}, True),
        ({"origin": "http://localhost:9090"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site", "origin": "http://localhost:8080"}, False),
    ],
)
def test_pages_of_other_origins_change_nothing(headers: dict[str, str], fine: bool) -> None:
    given = Headers({"host": "localhost:8080", **headers})
    assert (LOCAL.refusal("POST", given) is None) is fine
    assert LOCAL.refusal("GET", given) is None, "a page cannot read the answer"
