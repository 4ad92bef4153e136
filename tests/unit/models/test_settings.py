from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, SecretStr
from pydantic.dataclasses import dataclass

from isthmus.models.errors import InvalidInput
from isthmus.models.settings import Flag, Settings, nearest, scaled, settings_of


@plain_dataclass(frozen=True)
class Price:
    usd_per_byte: Annotated[float, Field(ge=0, description="Price."), Flag("usd_per_gb", 1e9)] = 0.5 / 1e9


@dataclass(frozen=True)
class Tls(Settings):
    ca: Annotated[Path, Field(description="Authority."), Flag("tls_ca", is_file=True)]


@dataclass(frozen=True)
class Config(Settings):
    name: Annotated[str, Field(description="Name.")]
    mode: Annotated[Literal["a", "b"], Field(description="Mode.")] = "a"
    wait_s: Annotated[float, Field(ge=0.001, le=60, description="Wait."), Flag("wait_ms", 1000)] = 1.0
    size: Annotated[int, Field(gt=0, description="Size.")] = 4
    key: Annotated[SecretStr | None, Field(description="Key.")] = None
    hosts: Annotated[tuple[str, ...], Field(description="Hosts."), Flag("host", separator=",")] = ("a:1", "b:2")
    folders: Annotated[tuple[Path, ...], Field(description="Folders.")] = ()
    price: Price = Price()
    tls: Tls | None = None
    inner: int = 3  # not to be set from outside


def test_every_field_with_a_description_is_a_setting_and_no_other() -> None:
    keys = ["name", "mode", "wait_ms", "size", "key", "host", "folders", "usd_per_gb", "tls_ca"]
    assert [setting.key for setting in settings_of(Config)] == keys


def test_a_setting_is_what_its_field_says() -> None:
    found = {setting.key: setting for setting in settings_of(Config)}
    wait, host, folders, price = (found[key] for key in ("wait_ms", "host", "folders", "usd_per_gb"))
    assert (wait.default, wait.bounds, wait.help) == (1000.0, {"ge": 1.0, "le": 60_000.0}, "Wait.")
    assert (price.path, price.default) == (("price", "usd_per_byte"), 0.5)
    assert (host.default, host.multiple, folders.multiple, folders.type) == ("a:1,b:2", False, True, Path)
    assert (found["name"].required, found["tls_ca"].required, wait.required) == (True, True, False)
    assert (found["key"].optional, found["key"].secret, wait.optional) == (True, True, False)
    assert found["wait_ms"].option == "--wait-ms"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("wait_ms", 250.0, 0.25),
        ("host", " a:1, ,b:2", ("a:1", "b:2")),
        ("key", "", None),
        ("name", "", ""),
        ("usd_per_gb", 0.5, Price().usd_per_byte),
    ],
)
def test_values_of_a_key_become_values_of_the_field(key: str, value: Any, field: Any) -> None:
    (setting,) = (setting for setting in settings_of(Config) if setting.key == key)
    assert setting.inward(value) == field


def test_values_are_checked_converted_and_frozen() -> None:
    config = Config("x", folders=("/a",), tls={"ca": "/b"})  # type: ignore[arg-type]
    assert (config.folders, config.tls) == ((Path("/a"),), Tls(Path("/b")))
    assert replace(config, mode="b").mode == "b"
    with pytest.raises(FrozenInstanceError):
        config.size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "c"}, "mode is 'c': input should be 'a' or 'b'"),
        ({"size": 0}, "size is 0: input should be greater than 0"),
        ({"wait_s": math.nan}, "wait_s is nan: input should be a finite number"),
        ({"wait_s": "x" * 1000}, f"wait_s is '{'x' * 49}: input should be a valid number"),
        ({"mdoe": "a"}, "Config has no field 'mdoe', did you mean 'mode'?"),
        ({"qqqqq": "a"}, "Config has no field 'qqqqq'"),
        ({"tls": {}}, "ca is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Config("x", **fields)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidInput, match="name is missing"):
        Config()  # type: ignore[call-arg]


def test_the_nearest_name() -> None:
    assert nearest("deadlin_ms", ["deadline_ms", "mode"]) == ", did you mean 'deadline_ms'?"
    assert nearest("zzz", ["deadline_ms", "mode"]) == ""


def test_units_do_not_blur_a_value() -> None:
    assert scaled(0.50 / 1e9, 1e9) == 0.5
    assert scaled(2 << 30, 1 / (1 << 20)) == 2048
    assert scaled(None, 1000) is None
