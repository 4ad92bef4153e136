"""What manifests record of where a run took place."""

from __future__ import annotations

import os
from importlib.metadata import version

from isthmus.models.recipes.common.environment import environment


def test_the_machine_has_cores_and_packages_have_versions() -> None:
    found = environment(("numpy", "torch"))
    assert found["machine"].endswith(f", {os.cpu_count()} cores")
    assert found["versions"] == {"numpy": version("numpy"), "torch": version("torch")}
