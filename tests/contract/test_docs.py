"""The documentation site builds without a warning, and its hand-written reference is that of the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from isthmus.edge_agent.http.app import create_app
from isthmus.edge_agent.http.openai.routes import routes
from isthmus.edge_agent.http.openai.schema import ChatMessage, ChatRequest, CompletionRequest, StreamOptions
from isthmus.edge_agent.vision.result import Answer
from isthmus.edge_agent.vision.task_answers import Classification
from tests.bench.processes import ROOT

DOCS = ROOT / "docs"
API: dict[str, Any] = yaml.safe_load((DOCS / "reference/openapi.yaml").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = API["components"]["schemas"]
OUTSIDE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?https?://""")
NAMED = re.compile(r"`((?:edge_agent|cloud_service|protos|models|tests|docs)/[\w./-]+)`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_site_has_every_page_and_fetches_nothing_from_outside(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md") if path.name != "README.md"}
    built = {path.relative_to(site): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert pages <= set(built)
    for page, text in built.items():
        assert not OUTSIDE.search(text), page


def test_tables_are_made_from_settings_and_openapi(site: Path) -> None:
    configuration = (site / "reference/configuration.html").read_text(encoding="utf-8")
    assert "--min-agreement" in configuration and "--queue-limit" in configuration
    http = (site / "reference/http.html").read_text(encoding="utf-8")
    assert "POST /v1/chat/completions" in http and "[openapi:" not in http


def test_openapi_has_the_routes_of_the_app() -> None:
    nothing: Any = object()  # only handlers look at it
    app = create_app(CollectorRegistry(), (nothing, nothing), routes(nothing), streams=nothing)
    known = {route.path.replace(":path", ""): route.methods for route in app.routes if isinstance(route, Route)}
    assert set(known) == set(API["paths"])
    for path, operations in API["paths"].items():
        if known[path] is not None:
            assert {method.upper() for method in operations} <= known[path]


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, ChatMessage, StreamOptions])
def test_openapi_has_the_fields_of_requests(model: Any) -> None:
    schema = SCHEMAS[model.__name__]
    assert set(schema["properties"]) == set(model.model_fields)
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert set(schema.get("required", ())) == required


@pytest.mark.parametrize("model", [Answer, Classification])
def test_openapi_has_the_fields_of_answers(model: Any) -> None:
    assert list(SCHEMAS[model.__name__]["properties"]) == [field.name for field in dataclasses.fields(model)]


def test_decisions_are_numbered_and_listed() -> None:
    pages = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    index = (DOCS / "decisions/index.md").read_text(encoding="utf-8")
    assert [int(name[:2]) for name in pages] == list(range(1, len(pages) + 1))
    for name in pages:
        title = (DOCS / "decisions" / name).read_text(encoding="utf-8").splitlines()[0]
        number, _, words = title.removeprefix("# ").partition(". ")
        assert f"| {number} | [{words}]({name}) |" in index


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))])
def test_files_that_a_page_names_exist(page: str) -> None:
    for named in NAMED.findall((ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named
