from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from isthmus.edge_agent.cost_profiles import FOLDER, UNITS, open_profile, packaged
from isthmus.edge_agent.policy.prices import Prices
from isthmus.models.errors import InvalidInput

WIFI = (FOLDER / "wifi.toml").read_text()


def test_every_packaged_profile_has_each_number_with_its_unit_and_source() -> None:
    assert packaged() == ["lte", "lte-m", "wifi", "wired"]
    for name in packaged():
        profile = open_profile(name)
        assert profile.name == name and profile.energy.compute_w > profile.energy.idle_w
        content = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        for table, units in UNITS.items():
            assert {key: entry["unit"] for key, entry in content[table].items()} == units
            assert all(len(entry["source"]) > 15 for entry in content[table].values())


def test_the_default_profile_has_the_prices_that_are_used_without_one() -> None:
    prices = open_profile("wifi").prices
    assert prices.usd(1e9, 3600, 3600) == pytest.approx(Prices().usd(1e9, 3600, 3600)) == pytest.approx(0.55)


def test_numbers_are_in_bytes_and_seconds() -> None:
    energy = open_profile("lte").energy
    assert energy.up_j_per_byte == pytest.approx(8 * 0.66e-6)
    assert (energy.tail_s, energy.tail_w) == (11.6, 1.06)


def test_a_given_price_takes_the_place_of_the_profiles() -> None:
    prices = open_profile("lte-m", Prices(up_usd_per_byte=3e-9)).prices
    assert (prices.up_usd_per_byte, prices.cloud_usd_per_s) == (3e-9, open_profile("lte-m").prices.cloud_usd_per_s)
    assert open_profile("lte-m", Prices(device_usd_per_s=0.5)).prices.device_usd_per_s == 0.5


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(WIFI.replace("value = 6.4", "value = 12.5"))
    profile = open_profile(str(path))
    assert (profile.name, profile.energy.compute_w) == ("mine", 12.5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("[money]", "[mony]"), "unknown table 'mony', did you mean 'money'?"),
        (("idle =", "idel ="), "unknown number energy.idel, did you mean 'idle'?"),
        (('unit = "s"', 'unit = "ms"'), "energy.tail has unit 'ms', expected 's'"),
        (("value = 0.24", 'value = "0.24"'), "energy.tail is '0.24', expected 0 to 1e+06 s"),
        (("value = 0.24", "value = -1"), "energy.tail is -1, expected 0 to 1e+06 s"),
        (("value = 0.24", "value = nan"), "energy.tail is nan, expected 0 to 1e+06 s"),
        (("value = 0.24", "value = true"), "energy.tail is True, expected"),
        (('source = "assumption: a Raspberry Pi 4, idle"', 'source = " "'), "energy.idle has no source"),
        (("[energy]", "[energy]\n[energy.more]"), "unknown number energy.more"),
        (("[money]", "money = 1\n[monies]"), "unknown table 'monies'"),
        (("[money]", "["), "not TOML"),
    ],
)
def test_what_is_wrong_with_a_profile_is_one_line(tmp_path: Path, changed: tuple[str, str], said: str) -> None:
    path = tmp_path / "mine.toml"
    assert changed[0] in WIFI
    path.write_text(WIFI.replace(changed[0], changed[1], 1))
    with pytest.raises(InvalidInput) as error:
        open_profile(str(path))
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_numbers_and_bare_ones_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(InvalidInput, match=r"money\.up is missing, expected \{ value = …, unit = \"USD/GB\""):
        open_profile(str(path))
    path.write_text("[money]\nup = 0.5\n")
    with pytest.raises(InvalidInput, match=r"money\.up is 0\.5, expected \{ value"):
        open_profile(str(path))
    path.write_bytes(b"#" * 100_000)
    with pytest.raises(InvalidInput, match="larger than 65536 bytes"):
        open_profile(str(path))


@pytest.mark.parametrize("name", ["wify", "no/such.toml", ".", "a\0b"])
def test_a_profile_that_does_not_exist_names_those_that_do(name: str) -> None:
    with pytest.raises(InvalidInput, match="neither a file nor one of lte, lte-m, wifi, wired"):
        open_profile(name)
