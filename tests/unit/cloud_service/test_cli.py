from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc
from pydantic import SecretStr

from isthmus.cloud_service.cli import main, start_logging
from isthmus.cloud_service.config import EngineConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import free_port
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment)


def test_help_has_an_example() -> None:
    assert "Examples:\n    cloud-service --bundle" in invoke("--help").stdout


def test_it_says_its_version() -> None:
    assert version("isthmus") in invoke("--version").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--bundle"),
        (("--bundle", "/nowhere"), "no such bundle folder"),
        (("--bundle", "x", "--max-batch", "0"), "max-batch"),
        (("--handoff", "x"), "--bundle, --model or --engine-url"),
        (("--bundle", "x", "--tls-key", __file__), "--tls-certificate"),
        (("--engine-url", "http://h:1"), "--engine-tokenizer is missing"),
        (("--engine-tokenizer", "x"), "--engine-url is missing"),
        (("--engine-url", "h:8000", "--engine-tokenizer", "x"), "expected http://HOST:PORT"),
        (("--engine-url", "http://u:secret@h", "--engine-tokenizer", "x"), "it holds a user"),
        (("--engine-url", "http://h", "--engine-tokenizer", "/nothing"), "--engine-tokenizer nothing: no such file"),
        (("--bundle", "x", "--listen", "localhost:115587"), "listen is 'localhost:115587': not HOST:PORT"),
        (("--bundle", "x", "--metrics", "::1:9101"), "brackets"),
        (("--check", "http://127.0.0.1:50051"), "leave out 'http://'"),
        (("--check", "127.0.0.1"), "the port is missing"),
        (("--check", "a:1", "--check-key", __file__), "need each other"),
        (("--check", "a:1", "--check-name", "b"), "--check-ca"),
        (("--bundle", "moon"), "no bundle 'moon' in "),
        (("--bundle", "x", "--tls-client-ca", __file__), "--tls-"),
        (("--bundle", "x", "--config", "/nowhere.toml"), "/nowhere.toml"),
    ],
)
def test_a_wrong_call_ends_with_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_key_of_an_engine_is_hidden(tmp_path: Path) -> None:
    file = tmp_path / "key"
    arguments = ("--engine-url", "http://h/v1/", "--engine-tokenizer", "x", "--engine-key-file", str(file))
    file.write_text("two\nlines")
    result = invoke(*arguments)
    assert "expected one line with an API key" in result.stderr
    assert "two" not in result.stderr
    file.write_text(" sk-file\n")
    config = EngineConfig("http://h/v1/", "x", key_file=file, key=SecretStr("sk-text"))
    assert (config.url, config.secret, "sk-" in repr(config)) == ("http://h", "sk-file", False)
    shown = invoke(*arguments[:4], "--show-config", ISTHMUS_CLOUD_ENGINE_KEY="sk-text").stdout
    assert "********" in shown
    assert "sk-text" not in shown


def test_a_taken_port_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = invoke(
        "--bundle", str(tiny_bundle.folder), "--listen", "256.0.0.1:50051", "--metrics", "", "--insecure-listen"
    )
    assert result.exit_code == 1
    assert "cannot listen on 256.0.0.1:50051" in result.stderr


def test_health_check_of_nobody_fails() -> None:
    address = f"127.0.0.1:{free_port()}"
    result = invoke("--check", address, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"address": address, "health": "UNAVAILABLE"}


def test_a_health_check_needs_nothing_that_others_import() -> None:
    command = [sys.executable, "-m", "isthmus.cloud_service", "--check", f"127.0.0.1:{free_port()}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (1, "UNAVAILABLE\n", "")


def test_what_peers_do_wrong_in_grpc_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    grpc_log = logging.getLogger("grpc._cython.cygrpc")
    start_logging(as_json=False)
    for error in (DecodeError("bytes"), cygrpc.ExecuteBatchError("left"), ValueError("ours")):
        try:
            raise error
        except Exception:
            grpc_log.exception("raised by servicer method")
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [ValueError]


INTERRUPTED = """
import os, signal, sys
from isthmus.cloud_service import cli
from isthmus.cloud_service.vision import service
load = service.load
service.load = lambda *arguments: (os.kill(os.getpid(), signal.SIGINT), load(*arguments))[1]
cli.main(sys.argv[1:])
"""


def test_an_interrupt_while_models_are_loaded_ends_the_service(tiny_bundle: Bundle) -> None:
    arguments = ["--bundle", str(tiny_bundle.folder), "--listen", "127.0.0.1:0", "--metrics", ""]
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.strip()) == (1, "Aborted!")


def test_a_handoff_of_no_model_here_ends_with_one_clear_line(tmp_path: Path) -> None:
    model = Checkpoint.open(write_tiny_llama(tmp_path / "one", context=64))
    handoff = write_tiny_handoff(tmp_path / "handoff", model)
    write_tiny_llama(tmp_path / "two", seed=1, context=64)
    for settings in (("--handoff", str(handoff)), ()):
        environment = {} if settings else {"ISTHMUS_CLOUD_HANDOFF": str(handoff)}
        result = invoke("--model", str(tmp_path / "two"), "--metrics", "", *settings, **environment)
        assert result.exit_code == 1
        assert f"belongs to the model {model.fingerprint.hex()[:12]}…, served are two" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_settings_come_from_the_environment() -> None:
    result = invoke(ISTHMUS_CLOUD_BUNDLE="/nowhere/a")
    assert result.exit_code == 1
    assert "/nowhere/a" in result.stderr


def test_it_shows_its_settings_and_serves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cloud.toml"
    path.write_text('bundle = ["/nowhere/a", "/nowhere/b"]\ncontext_mb = 64\n')
    result = invoke("--show-config", "--json", "--width", "4", ISTHMUS_CLOUD_CONFIG=str(path))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["bundle"] == {"value": ["/nowhere/a", "/nowhere/b"], "source": str(path)}
    assert (found["context_mb"]["value"], found["width"]["source"]) == (64, "--width")
    assert ["metrics", "127.0.0.1:9101", "default"] in [
        line.split() for line in invoke("--show-config").stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("package", "arguments"), [("torch", ["--bundle", "fashion"]), ("grpc_health", ["--check", "127.0.0.1:9"])]
)
def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it(package: str, arguments: list[str]) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from isthmus.cloud_service.cli import main; main({arguments})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert f"error: the package {package} is missing: pip install 'isthmus[cloud]'" in result.stderr


def test_replicas_are_a_command_with_the_options_of_the_service() -> None:
    shown = invoke("ray", "--help")
    assert "--replicas" in shown.output
    assert "--tls-client-ca" in shown.output
    assert "cloud-service ray --bundle photos --replicas 2" in shown.output
    assert "--replicas" not in invoke("--help").output.replace("ray --bundle photos --replicas", "")


def test_the_settings_of_replicas_come_from_the_same_sources(tmp_path: Path) -> None:
    path = tmp_path / "cloud.toml"
    path.write_text('bundle = ["/nowhere/a"]\nmax_replicas = 8\n')
    environment = {"ISTHMUS_CLOUD_CONFIG": str(path), "ISTHMUS_CLOUD_REPLICAS": "3"}
    found = json.loads(invoke("ray", "--show-config", "--json", "--threads", "2", **environment).stdout)
    assert [found[key]["value"] for key in ("replicas", "max_replicas", "threads")] == [3, 8, 2]
    assert found["bundle"] == {"value": ["/nowhere/a"], "source": str(path)}


def test_an_option_before_a_command_is_refused() -> None:
    result = invoke("--bundle", "fashion", "ray")
    assert result.exit_code == 2
    assert "--bundle comes after ray" in result.stderr


def test_replicas_need_a_bundle() -> None:
    assert "give at least one --bundle" in invoke("ray").stderr


def test_without_ray_one_line_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from isthmus.cloud_service.cli import main;"
        "main(['ray', '--bundle', 'fashion'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "error: the package ray is missing: pip install 'isthmus[cloud,ray]'\n"
