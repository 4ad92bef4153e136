"""The folders of the repository are the packages of `isthmus`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("edge_agent", "cloud_service", "protos", "models")

setup(
    package_dir={f"isthmus.{folder}": folder for folder in FOLDERS},
    packages=[
        f"isthmus.{package}"
        for folder in FOLDERS
        for package in (folder, *(f"{folder}.{name}" for name in find_packages(folder)))
    ],
)
