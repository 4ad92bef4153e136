"""What mkdocs does beside its plugins: benchmark pictures are taken from where the benchmarks write them.

Pages name them as `../../tests/bench/results/…`, which also works where the repository is browsed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "tests/bench/results/"
SERVED = "benchmarks/results/"
PICTURES = (".png", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for picture in sorted((ROOT / RESULTS).iterdir()):
        if picture.suffix in PICTURES:
            files.append(File.generated(config, SERVED + picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"{up}../{RESULTS}", up + SERVED)
