from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field, SecretStr
from pydantic.dataclasses import dataclass

from isthmus.models.errors import InvalidInput
from isthmus.models.options import HIDDEN, MAX_FILE_BYTES, Command, build, describe, known_settings, options, read
from isthmus.models.settings import Flag, Settings


@dataclass(frozen=True)
class Tls(Settings):
    ca: Annotated[Path, Field(description="Authority."), Flag("tls_ca")]
    key: Annotated[Path | None, Field(description="Key."), Flag("tls_key")] = None


@dataclass(frozen=True)
class Config(Settings):
    mode: Annotated[Literal["a", "b"], Field(description="The mode.")] = "a"
    bits: Annotated[Literal[4, 8], Field(description="Bits.")] = 8
    wait_s: Annotated[float, Field(ge=0, le=60, description="Wait."), Flag("wait_ms", 1000)] = 1.0
    threads: Annotated[int, Field(ge=0, description="Threads.")] = 0
    fill: Annotated[bool, Field(description="Fill.")] = False
    hosts: Annotated[tuple[str, ...], Field(description="Hosts."), Flag("host", separator=",")] = ()
    tasks: Annotated[tuple[str, ...], Field(description="Tasks."), Flag("task")] = ()
    token: Annotated[SecretStr | None, Field(description="Token.")] = None
    tls: Tls | None = None


@dataclass(frozen=True)
class Other(Settings):
    model: Annotated[str, Field(description="Model.")]
    threads: Annotated[int, Field(ge=0, description="Threads.")] = 0


def program(seen: list[Any]) -> click.Command:
    @click.command(cls=Command)
    @click.option("--show", is_flag=True)
    @options("ISTHMUS_TEST", known_settings(Config, Other), {"Shared": (Config, Other), "Main": Config})
    def main(show: bool) -> None:
        seen.append(read(Config))
        click.echo(describe(as_json=not show))

    return main


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(program([]), arguments, env=environment)


def config(*arguments: str, **environment: str) -> Config:
    seen: list[Config] = []
    result = CliRunner().invoke(program(seen), arguments, env=environment)
    assert result.exit_code == 0, result.stderr
    return seen[0]


def test_without_anything_it_is_the_models_defaults() -> None:
    assert config() == Config()


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("wait_ms = 100\nthreads = 1\nbits = 4\n")
    found = config("--config", str(path), "--wait-ms", "300", ISTHMUS_TEST_WAIT_MS="200", ISTHMUS_TEST_THREADS="2")
    assert found == Config(wait_s=0.3, threads=2, bits=4)


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('mode = "b"\nmodel = "of another command"\n')
    assert config(ISTHMUS_TEST_CONFIG=str(path)) == Config(mode="b")


def test_every_source_has_the_same_grammar(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('fill = true\nhost = ["a:1", "b:2"]\ntask = ["x", "y"]\ntls_ca = "/ca"\nbits = 4\n')
    expected = Config(fill=True, hosts=("a:1", "b:2"), tasks=("x", "y"), tls=Tls(Path("/ca")), bits=4)
    assert config("--config", str(path)) == expected
    line = ("--fill", "--host", "a:1, b:2", "--task", "x", "--task", "y", "--tls-ca", "/ca", "--bits", "4")
    assert config(*line) == expected
    names = {"FILL": "1", "HOST": "a:1,b:2", "TASK": "x y", "TLS_CA": "/ca", "BITS": "4"}
    assert config(**{f"ISTHMUS_TEST_{name}": value for name, value in names.items()}) == expected
    assert config("--config", str(path), "--no-fill").fill is False
    path.write_text('host = "a:1,b:2"\ntask = "x"\n')
    assert config("--config", str(path)) == Config(hosts=("a:1", "b:2"), tasks=("x",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("thraeds = 1", "unknown key 'thraeds', did you mean 'threads'?"),
        ("zzzzzz = 1", "unknown key 'zzzzzz'"),
        ("[mode]\na = 1", "mode is a table, expected one value"),
        ("threads = [1, 2]", "threads is a list, expected one value"),
        ("task = [[1]]", "task is a list, expected values"),
        ("threads = ", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
        ("\x00", "not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_key(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    result = invoke("--config", str(path))
    assert result.exit_code == 2
    assert f"Error: {path}: {words}" in result.stderr.splitlines()[-1]


def test_a_file_of_megabytes_is_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    assert "larger than" in invoke("--config", str(path)).stderr
    path.write_bytes(b"\xff\xfe")
    assert "not TOML" in invoke("--config", str(path)).stderr
    assert "does not exist" in invoke("--config", str(tmp_path / "none.toml")).stderr


def test_a_wrong_value_is_one_line_with_key_value_bounds_and_source(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("threads = 2.5\n")
    found = invoke("--config", str(path), "--threads", "-1").stderr.splitlines()[-1]
    assert found == "Error: Invalid value for '--threads': -1 is not in the range x>=0."
    found = invoke(ISTHMUS_TEST_MODE="c").stderr.splitlines()[-1]
    assert found == "Error: Invalid value for 'ISTHMUS_TEST_MODE': 'c' is not one of 'a', 'b'."
    found = invoke("--config", str(path)).stderr.splitlines()[-1]
    assert f"'threads' in {path}: '2.5' is not a valid integer" in found
    path.write_text("wait_ms = true\n")
    assert f"'wait_ms' in {path}: 'True' is not a valid float" in invoke("--config", str(path)).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--wait-ms", "nan"), "wait_s is nan"),
        (("--tls-key", "/k"), "--tls-ca is missing: Authority."),
    ],
)
def test_what_only_the_model_finds_is_an_error_of_usage_too(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]


def test_it_shows_each_value_and_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('token = "hunter2"\ntask = ["x", "y"]\n')
    shown = invoke("--config", str(path), "--threads", "3", ISTHMUS_TEST_MODE="b")
    assert "hunter2" not in shown.stdout
    found = json.loads(shown.stdout)
    assert next(iter(found)) == "threads"  # in the order of the options
    assert found["threads"] == {"value": 3, "source": "--threads"}
    assert found["mode"] == {"value": "b", "source": "ISTHMUS_TEST_MODE"}
    assert found["token"] == {"value": HIDDEN, "source": str(path)}
    assert found["task"]["value"] == ["x", "y"]
    assert found["wait_ms"] == {"value": 1000.0, "source": "default"}
    lines = invoke("--config", str(path), "--show").stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("task")] == [["task", "x", "y", str(path)]]
    assert [line.split() for line in lines if line.startswith("tls_ca")] == [["tls_ca", "-", "default"]]


def test_help_has_bounds_defaults_and_sections() -> None:
    text = invoke("--help").stdout
    assert text.index("Options:") < text.index("Shared:") < text.index("--threads INTEGER") < text.index("Main:")
    assert "[default: 1000.0; 0<=x<=60000]" in " ".join(text.split())
    assert "[a|b]" in text and "[4|8]" in text and "--no-fill" in text


def test_a_required_setting_may_have_a_default_of_the_command() -> None:
    @click.command()
    @options("ISTHMUS_TEST", known_settings(Other), {"Main": Other}, model="tiny")
    def main() -> None:
        click.echo(read(Other).model)

    assert CliRunner().invoke(main).stdout == "tiny\n"
    assert CliRunner().invoke(main, ["--model", "big"]).stdout == "big\n"
    with pytest.raises(InvalidInput, match="--model is missing: Model."):
        build(Other, {})
