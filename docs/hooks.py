"""What mkdocs builds beside its plugins. Imports no PyTorch.

Pictures of benchmarks are taken from where the benchmarks write them: pages name them as `../../tests/bench/results/…`,
which also works where the repository is browsed. Two directives of a line of their own become tables:

    [settings: isthmus.edge_agent.config.EdgeConfig]    options, names in the environment, keys of the file
    [openapi: reference/openapi.yaml]                   operations and schemas
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from isthmus.models.settings import Setting, settings_of

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TREE = ROOT / "build" / "tree" / "isthmus"
FOLDERS = ("edge_agent", "cloud_service", "protos", "models")
RESULTS = "tests/bench/results/"
SERVED = "benchmarks/results/"
SHIM, SHIM_HERE = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker.js"  # nothing comes from another host
PICTURES = (".png", ".svg")
DIRECTIVE = re.compile(r"^\[(settings|openapi): (\S+)\]$", re.MULTILINE)
Node = Mapping[str, Any]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay links to the folders under the names of their packages: mkdocstrings reads files and imports nothing."""
    TREE.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        if not (TREE / folder).exists():
            (TREE / folder).symlink_to(ROOT / folder)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for picture in sorted((ROOT / RESULTS).iterdir()):
        if picture.suffix in PICTURES:
            files.append(File.generated(config, SERVED + picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"{up}../{RESULTS}", up + SERVED)
    return DIRECTIVE.sub(lambda found: "\n".join(TABLES[found[1]](found[2])), markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    return output.replace(SHIM, "../" * page.file.src_uri.count("/") + SHIM_HERE)


def on_post_template(output_content: str, **_: Any) -> str:
    return output_content.replace(SHIM, SHIM_HERE)


def settings_table(name: str) -> Iterator[str]:
    """Every setting of a model; those of a nested model are optional as a whole."""
    module, _, model = name.rpartition(".")
    yield from header("option", "in Python", "values", "default", "meaning")
    for setting in settings_of(getattr(importlib.import_module(module), model)):
        default = "–" if setting.default in (None, ()) else f"`{setting.default}`"
        if setting.required and len(setting.path) == 1:
            default = "required"
        yield row(f"`{setting.option}`", f"`{'.'.join(setting.path)}`", values(setting), default, setting.help)


def values(setting: Setting) -> str:
    """What a setting accepts, for a person."""
    if choices := getattr(setting.type, "__args__", ()):
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = " to ".join(f"{setting.bounds[end]:g}" for end in ("ge", "gt", "le") if end in setting.bounds)
    kind = {"bool": "on or off", "Path": "path", "str": "text", "int": "integer", "float": "number"}
    name = kind.get(setting.type.__name__, setting.type.__name__)
    return f"{name}, {bounds}" if " to " in bounds else f"{name} from {bounds}" if bounds else name


def openapi_tables(path: str) -> Iterator[str]:
    """Operations by tag, then schemas."""
    api: Node = yaml.safe_load((DOCS / path).read_text(encoding="utf-8"))
    for tag in api["tags"]:
        yield f"\n## {tag['name'].capitalize()}"
        for address, methods in api["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from operation_section(f"{method.upper()} {address}", operation, api)
    yield "\n## Schemas"
    for name, schema in api["components"]["schemas"].items():
        yield f"\n### {name}\n\n{schema.get('description', '')}\n"
        if "oneOf" in schema:
            yield f"One of {', '.join(type_of(part) for part in schema['oneOf'])}."
            continue
        yield from header("field", "type", "meaning")
        for field, part in schema["properties"].items():
            needed = " (required)" if field in schema.get("required", ()) else ""
            yield row(f"`{field}`{needed}", type_of(part), meaning(part))


def operation_section(title: str, operation: Node, api: Node) -> Iterator[str]:
    yield f"\n### {title}\n\n{operation['summary']}. {operation.get('description', '')}\n"
    parameters = [resolved(parameter, api) for parameter in operation.get("parameters", ())]
    if parameters:
        yield from header("parameter", "in", "type", "meaning")
        for part in parameters:
            yield row(f"`{part['name']}`", part["in"], type_of(part["schema"]), meaning({**part["schema"], **part}))
    if "requestBody" in operation:
        yield f"\nBody: {content(operation['requestBody'])}. {operation['requestBody'].get('description', '')}\n"
    yield ""
    yield from header("status", "reply", "meaning")
    for status, reply in operation["responses"].items():
        yield row(status, content(reply), reply["description"])


def resolved(part: Node, api: Node) -> Node:
    """A parameter, or what its reference names."""
    return api["components"]["parameters"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def content(body: Node) -> str:
    """Media types of a body, with the schema where it has a name."""
    kinds = [(kind, type_of(part["schema"])) for kind, part in body["content"].items()]
    return ", ".join(f"`{kind}` {name}" if name.startswith("[") else f"`{kind}`" for kind, name in kinds)


def type_of(schema: Node) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if schema.get("type") == "array" and schema.get("items"):
        return f"array of {type_of(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_of(schema['additionalProperties'])}"
    kinds = schema.get("type", "any")
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def meaning(part: Node) -> str:
    """Description, values, bounds and default."""
    said = [part.get("description", "")]
    if "enum" in part:
        said.append("One of " + ", ".join(f"`{value}`" for value in part["enum"]) + ".")
    ends = [f"{word} {part[name]}" for name, word in (("minimum", "at least"), ("maximum", "at most")) if name in part]
    said += [", ".join(ends).capitalize() + "."] if ends else []
    said += [f"Default `{str(part['default']).lower()}`."] if "default" in part else []
    return " ".join(said).strip()


def header(*names: str) -> Iterator[str]:
    yield row(*names)
    yield row(*("---" for _ in names))


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


TABLES = {"settings": settings_table, "openapi": openapi_tables}
