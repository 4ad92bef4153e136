"""What others install: a wheel of one package with a small bundle, which leaves their own folders alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.bench.processes import ROOT

FOLDERS = ("edge_agent", "cloud_service", "protos", "models")
SHIPPED = {"fashion", "smollm2-4-smollm2", "smollm2-8-smollm2"}
SPARED = shutil.ignore_patterns("__pycache__", "*.pyc", "elpv", "photos", "smollm2", "smollm2-25", "student")


def build(place: Path, *folders: str) -> Path:
    """A wheel of a copy of the repository with these folders."""
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in folders:
        shutil.copytree(ROOT / folder, source / folder, ignore=SPARED)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "-w", str(place), str(source)], check=True, timeout=170)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), *FOLDERS)


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with folders of the names of ours, and the wheel unpacked in its `site`."""
    folder = tmp_path_factory.mktemp("project")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"OWN = {name!r}\n")
    return folder


def run(project: Path, code: str) -> str:
    """Without the .pth files of this environment, so that its editable install is not found."""
    paths = ["", str(project / "site"), sysconfig.get_path("purelib")]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_installs_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"isthmus", f"isthmus-{wheel.name.split('-')[1]}.dist-info"}
    assert not [name for name in names if name.startswith("isthmus/tests")]


def test_it_holds_every_module_and_a_small_bundle(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {f"isthmus/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert modules <= names
    static = (ROOT / "edge_agent/http/page/static").iterdir()
    assert {f"isthmus/{path.relative_to(ROOT)}" for path in static} <= names
    for bundle in SHIPPED:
        assert {f"isthmus/{path.relative_to(ROOT)}" for path in (ROOT / "models/zoo" / bundle).iterdir()} <= names
    assert {name.split("/")[3] for name in names if name.startswith("isthmus/models/zoo/")} == SHIPPED
    assert wheel.stat().st_size < 8 << 20


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("edge-agent", "isthmus.edge_agent.cli.main"),
        ("cloud-service", "isthmus.cloud_service.cli"),
        ("isthmus", "isthmus.edge_agent.cli.isthmus"),
    ],
)
def test_programs_run_outside_of_the_checkout(project: Path, program: str, module: str) -> None:
    points = (next((project / "site").glob("*.dist-info")) / "entry_points.txt").read_text()
    assert f"{program} = {module}:main" in points
    assert run(project, f"from {module} import main; main(['--version'])").startswith(f"{program}, version ")


def test_the_bundle_that_comes_along_is_pulled_and_opened_by_its_name(project: Path) -> None:
    pulled = run(
        project, "from isthmus.edge_agent.cli.isthmus import main; main(['pull', 'fashion', '--to', 'bundles'])"
    )
    assert pulled.startswith("fashion: pulled: bundles/fashion")
    code = "from isthmus.edge_agent import EdgeAgent, EdgeConfig; print(EdgeAgent(EdgeConfig('fashion')).manifest.name)"
    assert run(project, code) == "fashion\n"


def test_a_project_keeps_folders_of_the_same_names(project: Path) -> None:
    own = "; ".join(f"import {name}, isthmus.{name}; assert {name}.OWN == {name!r}" for name in FOLDERS)
    assert run(project, f"{own}; print(isthmus.models.__file__)").startswith(str(project / "site"))


@pytest.mark.parametrize("side", ["edge_agent", "cloud_service"])
def test_an_image_of_one_side_is_built_without_the_other(side: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path, side, "protos", "models")) as archive:
        folders = {name.split("/")[1] for name in archive.namelist() if name.startswith("isthmus/")}
    assert folders == {side, "protos", "models"}
