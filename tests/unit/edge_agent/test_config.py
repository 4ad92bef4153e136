from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from isthmus.edge_agent.config import EdgeConfig, LanguageConfig, Tls, WholeImage
from isthmus.edge_agent.policy.prices import Prices
from isthmus.models.bundle.installed import SHIPPED
from isthmus.models.errors import InvalidInput
from isthmus.models.options import build


def test_the_default_bundle_is_of_natural_photos() -> None:
    assert EdgeConfig().bundle == SHIPPED / "photos"


def test_text_becomes_a_path_and_a_name_an_installed_bundle() -> None:
    assert EdgeConfig(bundle="models/zoo/elpv", clouds=("cloud:50051",)).bundle == Path("models/zoo/elpv")  # type: ignore[arg-type]
    assert LanguageConfig("m", handoff="smollm2").handoff == SHIPPED / "smollm2"  # type: ignore[arg-type]


def test_it_is_frozen_and_checks_what_replaces() -> None:
    config = EdgeConfig(Path("b"), ("cloud:1",), "offload")
    with pytest.raises(FrozenInstanceError):
        config.mode = "edge"  # type: ignore[misc]
    assert replace(config, mode="edge").mode == "edge"
    with pytest.raises(InvalidInput, match="mode is 'sideways'"):
        replace(config, mode="sideways")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no field 'clod', did you mean 'clouds'"):
        EdgeConfig(Path("b"), clod="x")  # type: ignore[call-arg]


def test_options_build_both_configs() -> None:
    values = {
        "bundle": Path("b"),
        "cloud": "a:1, b:2,",
        "task": ("x", "y"),
        "deadline_ms": 250.0,
        "usd_per_gb": 2.0,
        "usd_per_cloud_hour": 3.6,
        "image_format": "webp",
        "tls_ca": Path("ca"),
        "model": "m",
        "device_bits": 4,
        "on_loss": "wait",
    }
    tls, prices = Tls(Path("ca")), Prices(2e-9, 1e-3)
    assert build(LanguageConfig, values) == LanguageConfig(
        "m", ("a:1", "b:2"), on_loss="wait", device_bits=4, tls=tls, prices=prices
    )
    whole = WholeImage("webp")
    assert build(EdgeConfig, values) == EdgeConfig(
        Path("b"), ("a:1", "b:2"), tasks=("x", "y"), deadline_s=0.25, tls=tls, prices=prices, whole_image=whole
    )


def test_nothing_given_is_the_defaults() -> None:
    assert build(EdgeConfig, {}) == EdgeConfig()
    assert build(LanguageConfig, {"model": "m"}) == LanguageConfig("m")
