from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from starlette.testclient import TestClient

from isthmus.edge_agent.cli.main import chat, main, run, to_language_config
from isthmus.edge_agent.config import EdgeConfig, LanguageConfig
from isthmus.models.vision.bundle import Bundle
from tests.bench.tiny_llama import write_tiny_llama


@pytest.fixture
def photos(tmp_path: Path, photo: Image.Image) -> tuple[str, str, str]:
    """Good, unreadable, good."""
    first, second, third = (tmp_path / name for name in ("a.png", "b.png", "c.jpg"))
    photo.save(first)
    second.write_bytes(b"no photo")
    photo.save(third)
    return str(first), str(second), str(third)


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


def test_one_unreadable_file_fails_alone(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", *photos, "--bundle", str(tiny_bundle.folder), "--json")
    assert result.exit_code == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == [photos[0], photos[2]]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {photos[1]}: not a readable")


def test_a_person_reads_label_place_time_and_reason(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), "--mode", "edge")
    assert result.exit_code == 0
    assert "on the device at exit1" in result.stdout
    assert "why: mode edge" in result.stdout
    assert " ms" in result.stdout


def test_settings_come_from_the_environment(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    folder = str(tiny_bundle.folder)
    result = invoke("infer", photos[0], "--json", ISTHMUS_EDGE_BUNDLE=folder, ISTHMUS_EDGE_MODE="edge")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["why"] == "mode edge"


def test_pins_and_tasks_reach_the_agent(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    pins = ("--tap", "light", "--width", "0.5", "--rate", "2", "--task", "colour", "--task", "defect")
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), "--json", *pins)
    assert result.exit_code == 0
    row = json.loads(result.stdout)
    assert row["why"].startswith("tap light, width 0.5, rate 2 requested; no cloud is configured")
    assert (row["missing"], list(row["answers"])) == (["colour"], ["defect"])
    read = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), *pins).stdout
    assert "colour MISSING" in read and "DEGRADED" in read


def test_tasks_come_from_the_environment_too(tiny_bundle: Bundle, photos: tuple[str, str, str]) -> None:
    folder = str(tiny_bundle.folder)
    result = invoke("infer", photos[0], "--json", ISTHMUS_EDGE_BUNDLE=folder, ISTHMUS_EDGE_TASK="defect colour")
    assert json.loads(result.stdout)["missing"] == ["colour"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "size"), "task 'size' does not exist, there are defect, colour"),
        (("--tap", "medium"), "tap 'medium' does not exist, there are light, deep"),
        (("--tap", "deep", "--width", "0.5"), "width 0.5 does not exist at tap deep, there are 1"),
        (("--rate", "7"), "rate 7 does not exist, there are 0 to 2"),
        (("--width", "7"), "--width"),
        (("--rate", "-1"), "--rate"),
    ],
)
def test_what_the_bundle_does_not_have_is_said_in_one_line(
    tiny_bundle: Bundle, photos: tuple[str, str, str], arguments: tuple[str, ...], words: str
) -> None:
    result = invoke("infer", photos[0], "--bundle", str(tiny_bundle.folder), *arguments)
    assert result.exit_code != 0 and result.stdout == ""
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("infer", "x.png", "--bundle", "/nowhere"), "no such bundle folder"),
        (("infer", "x.png", "--mode", "sideways"), "sideways"),
        (("infer", "x.png", "--deadline-ms", "0"), "deadline-ms"),
        (("infer",), "FILES"),
        (("run", "--listen", "8080"), "HOST:PORT"),
        (("run", "--listen", "localhost:99999"), "HOST:PORT"),
        (("run", "--bundle", "/nowhere"), "no such bundle folder"),
    ],
)
def test_a_wrong_call_ends_with_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", [(), ("infer",), ("run",), ("chat",)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Example: edge-agent" in result.stdout


def test_command_line_and_config_have_the_same_defaults(tmp_path: Path) -> None:
    from isthmus.edge_agent.cli.main import infer, to_config

    context = infer.make_context("infer", ["x.png"])
    for name in ("files", "as_json", "tap", "width", "rate"):
        context.params.pop(name)
    made = to_config(**context.params)
    assert made == EdgeConfig(bundle=made.bundle)


def test_the_agent_imports_no_pytorch() -> None:
    imports = "import sys, isthmus.edge_agent.http.app, isthmus.edge_agent.cli.main"
    code = f"{imports}; print(sys.modules.keys() & {{'torch', 'compressai'}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", scale=0.3))


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


def test_a_chat_of_lines_with_a_model_on_the_device(model: str) -> None:
    arguments = ["chat", "--model", model, "--json", "--max-tokens", "4", "--threads", "1"]
    result = CliRunner().invoke(main, arguments, input="hi\n\nand you\n")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["arm"] == "edge" and not row["degraded"]
        assert row["made"] == {"edge": row["tokens"], "draft": 0, "cloud": 0} and 1 <= row["tokens"] <= 4


def test_a_chat_of_which_an_answer_failed_says_so(model: str) -> None:
    arguments = ["chat", "--model", model, "--json", "--max-tokens", "4", "--threads", "1", "--context", "80"]
    result = CliRunner().invoke(main, arguments, input="far too long " * 20 + "\nhi\n")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2


def test_command_line_and_language_config_have_the_same_defaults() -> None:
    for command in (chat, run):
        context = command.make_context(str(command.name), ["--model", "m"])
        context.params.pop("arm", None)
        assert to_language_config(**context.params) == LanguageConfig("m")


def test_several_clouds_by_commas() -> None:
    context = run.make_context(
        "run", ["--model", "m", "--cloud", "a:1, b:2,", "--on-loss", "wait", "--device-bits", "4"]
    )
    config = to_language_config(**context.params)
    assert config == LanguageConfig("m", ("a:1", "b:2"), on_loss="wait", device_bits=4)


def test_run_serves_prompts_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def serve(app: Any, **settings: Any) -> None:
        client = TestClient(app)
        served.append(client.get("/v1/models").json())
        body = {"model": "auto", "prompt": "hi", "max_tokens": 2}
        served.append(client.post("/v1/completions", json=body).json())
        served.append(client.get("/metrics").text)

    monkeypatch.setattr("uvicorn.run", serve)
    result = invoke("run", "--model", model, "--json", "--threads", "1", "--listen", "127.0.0.1:0")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"listen": "127.0.0.1:0", "model": "tiny", "cloud": "no cloud"}
    assert any(entry["id"].startswith("tiny") for entry in served[0]["data"])
    tokens = served[1]["usage"]["completion_tokens"]
    assert 1 <= tokens <= 2
    assert f'isthmus_edge_tokens_total{{source="edge"}} {float(tokens)}' in served[2]
