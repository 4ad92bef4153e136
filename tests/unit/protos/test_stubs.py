from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = Path("protos/isthmus/v1")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stubs generated now, from the committed contract."""
    out = tmp_path_factory.mktemp("stubs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "isthmus/protos=protos"]
        + [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        + [f"isthmus/{FOLDER}/isthmus.proto"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
    )
    return out / "isthmus" / FOLDER


@pytest.mark.parametrize("name", ["isthmus_pb2.py", "isthmus_pb2.pyi", "isthmus_pb2_grpc.py", "isthmus_pb2_grpc.pyi"])
def test_committed_stubs_are_those_of_the_contract(fresh: Path, name: str) -> None:
    assert (ROOT / FOLDER / name).read_text() == (fresh / name).read_text(), "run make protos"
