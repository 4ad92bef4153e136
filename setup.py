"""The folders of the repository are the packages of `isthmus`; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# An image of one side is built without the other's folder.
FOLDERS = [name for name in ("edge_agent", "cloud_service", "protos", "models") if Path(name).is_dir()]

setup(
    package_dir={f"isthmus.{folder}": folder for folder in FOLDERS},
    packages=[
        f"isthmus.{package}"
        for folder in FOLDERS
        for package in (folder, *(f"{folder}.{name}" for name in find_packages(folder)))
    ],
)
