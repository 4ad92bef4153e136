"""Cost profiles in TOML: those that come with the package, or a file of one's own.

    [money]  up, down (USD/GB), cloud (USD/h), tokens (USD/million)
    [energy] compute, idle, tail_power (W), up, down (J/bit), tail (s)

Every number has its unit and its source: up = { value = 0.5, unit = "USD/GB", source = "an IoT data plan" }.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from isthmus.edge_agent.policy.prices import CostProfile, Energy, Prices
from isthmus.models.errors import InvalidInput
from isthmus.models.settings import nearest

FOLDER = Path(__file__).parent / "profiles"
MAX_BYTES = 1 << 16  # of a profile: ten numbers with their sources
MAX_VALUE = 1e6  # of any number, in its unit
UNITS = {
    "money": {"up": "USD/GB", "down": "USD/GB", "cloud": "USD/h", "tokens": "USD/million"},
    "energy": {"compute": "W", "idle": "W", "up": "J/bit", "down": "J/bit", "tail": "s", "tail_power": "W"},
}
SI = {"USD/GB": 1e-9, "USD/h": 1 / 3600, "USD/million": 1e-6, "W": 1.0, "J/bit": 8.0, "s": 1.0}  # bytes, seconds


def packaged() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def open_profile(name: str, overrides: Prices = Prices()) -> CostProfile:
    """The packaged profile of this name, or the file. What `overrides` has takes the place of its prices.

    Raises InvalidInput that names the file and the number that is wrong.
    """
    path = FOLDER / f"{name}.toml" if name in packaged() else Path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        known = f"it is neither a file nor one of {', '.join(packaged())}{nearest(name, packaged())}"
        raise InvalidInput(f"profile {name[:200]!r} cannot be read: {known}") from error
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"profile {path}: larger than {MAX_BYTES} bytes")
    try:
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"profile {path}: not TOML: {error}") from error
    return as_profile(path, content, overrides)


def as_profile(path: Path, content: Mapping[str, Any], overrides: Prices) -> CostProfile:
    """Raises InvalidInput."""
    for table in content:
        if table not in UNITS:
            raise InvalidInput(f"profile {path}: unknown table {table!r:.64}{nearest(table, UNITS)}")
    money, energy = (numbers(path, table, content.get(table, {})) for table in UNITS)
    prices = Prices(
        money["up"] if overrides.up_usd_per_byte is None else overrides.up_usd_per_byte,
        money["cloud"] if overrides.cloud_usd_per_s is None else overrides.cloud_usd_per_s,
        down_usd_per_byte=money["down"],
        usd_per_token=money["tokens"],
    )
    if overrides.device_usd_per_s:
        prices = replace(prices, device_usd_per_s=overrides.device_usd_per_s)
    parts = (energy[key] for key in ("compute", "idle", "up", "down", "tail", "tail_power"))
    return CostProfile(path.stem, prices, Energy(*parts))


def numbers(path: Path, table: str, given: Any) -> dict[str, float]:
    """Every number of a table, in SI units. Raises InvalidInput."""
    if not isinstance(given, dict):
        raise InvalidInput(f"profile {path}: {table} is no table")
    for key in given:
        if key not in UNITS[table]:
            raise InvalidInput(f"profile {path}: unknown number {table}.{key:.64}{nearest(key, UNITS[table])}")
    return {key: number(f"profile {path}: {table}.{key}", given.get(key), unit) for key, unit in UNITS[table].items()}


def number(where: str, given: Any, unit: str) -> float:
    """Its value in SI units. Raises InvalidInput unless it has a value, this unit and a source."""
    form = f'{{ value = …, unit = "{unit}", source = "…" }}'
    if given is None:
        raise InvalidInput(f"{where} is missing, expected {form}")
    if not isinstance(given, dict) or set(given) != {"value", "unit", "source"}:
        raise InvalidInput(f"{where} is {given!r:.60}, expected {form}")
    value, source = given["value"], given["source"]
    if given["unit"] != unit:
        raise InvalidInput(f"{where} has unit {given['unit']!r:.32}, expected {unit!r}")
    if not isinstance(source, str) or not source.strip():
        raise InvalidInput(f"{where} has no source, expected where its value comes from")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_VALUE:
        raise InvalidInput(f"{where} is {value!r:.32}, expected 0 to {MAX_VALUE:g} {unit}")
    return float(value) * SI[unit]
