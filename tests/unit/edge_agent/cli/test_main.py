from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.edge_agent.cli.main import main


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("infer", "x.png", "--bundle", "/nowhere"), "no such bundle folder"),
        (("infer", "x.png", "--mode", "sideways"), "sideways"),
        (("infer", "x.png", "--deadline-ms", "0"), "deadline-ms"),
        (("infer",), "FILES"),
        (("run", "--listen", "8080"), "HOST:PORT"),
        (("run", "--listen", "localhost:99999"), "HOST:PORT"),
        (("run", "--listen", "http://localhost:80"), "leave out 'http://'"),
        (("infer", "x.png", "--cloud", "http://cloud:50051"), "leave out 'http://'"),
        (("infer", "x.png", "--cloud", "cloud"), "the port is missing"),
        (("chat", "--cloud", "cloud:1,::1:50051"), "brackets"),
        (("config", "--cloud", "cloud:115587"), "the port is above 65535"),
        (("run", "--bundle", "/nowhere"), "no such bundle folder"),
    ],
)
def test_a_wrong_call_ends_with_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("chat", "--model", "/nowhere.gguf"), 1, "/nowhere.gguf: no such file"),
        (("run", "--model", "/nowhere.gguf"), 1, "/nowhere.gguf: no such file"),
        (("chat", "--model", "/nowhere.gguf", "--arm", "verify"), 2, "--arm verify needs --cloud"),
        (("chat", "--arm", "cloud", "--cloud", " , "), 2, "--arm cloud needs --cloud"),
        (("chat", "--arm", "sideways"), 2, "sideways"),
        (("chat", "--temperature", "3"), 2, "temperature"),
        (("chat", "--max-tokens", "0"), 2, "max-tokens"),
        (("run", "--device-bits", "5"), 2, "device-bits"),
        (("run", "--context", "1"), 2, "context"),
    ],
)
def test_a_wrong_call_about_prompts_ends_with_one_clear_line(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [(), ("infer",), ("run",), ("chat",), ("config",)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:\n    edge-agent" in result.stdout


def test_the_agent_imports_no_pytorch() -> None:
    imports = "import sys, isthmus.edge_agent.http.app, isthmus.edge_agent.cli.main"
    code = f"{imports}; print(sys.modules.keys() & {{'torch', 'compressai'}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"


def test_help_and_version_need_no_onnx_runtime() -> None:
    imports = "import sys, isthmus.edge_agent.cli.main"
    code = f"{imports}; print(sys.modules.keys() & {{'onnxruntime', 'grpc', 'PIL', 'starlette'}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"


def test_it_says_its_version() -> None:
    assert version("isthmus") in invoke("--version").stdout


@pytest.mark.parametrize(
    ("package", "arguments", "extras"),
    [
        ("onnxruntime", ["infer", "x.png"], "edge"),
        ("uvicorn", ["run"], "edge"),
        ("tokenizers", ["chat"], "edge,llm"),
        ("tokenizers", ["run", "--model", "m"], "edge,llm"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it(
    package: str, arguments: list[str], extras: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from isthmus.edge_agent.cli.main import main; main({arguments})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == f"error: the package {package} is missing: pip install 'isthmus[{extras}]'\n"
