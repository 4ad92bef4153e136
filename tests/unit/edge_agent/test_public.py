"""What `isthmus.edge_agent` offers, and that importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import isthmus.edge_agent as package


@pytest.mark.parametrize("name", package.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(package, name) is not None


def test_the_version_is_that_of_the_distribution() -> None:
    assert package.__version__ == version("isthmus")
    with pytest.raises(AttributeError, match="no attribute 'EdgeAgents'"):
        package.EdgeAgents  # noqa: B018


def test_the_import_alone_loads_neither_runtime_nor_grpc() -> None:
    code = (
        "import sys, isthmus.edge_agent as e; e.__version__; print({'onnxruntime', 'grpc', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
