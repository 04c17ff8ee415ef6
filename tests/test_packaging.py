"""What an installation holds: every package, every data file, nothing else."""

from __future__ import annotations

import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import PurePath

import pytest
from places import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PLACES = SETTINGS["package-dir"]  # setuptools cannot discover packages that lie in two places


def folder_of(package: str) -> str:
    """Where a package lies in the checkout."""
    if package in PLACES:
        return PLACES[package]
    parent, _, name = package.rpartition(".")
    return f"{folder_of(parent)}/{name}"


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for top in PLACES.values()
        for path in (ROOT / top).rglob("*.py")
    }
    assert len(folders) > 10
    listed = SETTINGS["packages"]
    assert len(set(listed)) == len(listed)
    assert {folder_of(package) for package in listed} == folders


def test_every_file_goes_into_the_wheel_or_is_for_readers_of_the_repository():
    """A README and its pictures are read where the code is; a wheel is not read."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository: git lists its files")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PLACES.values()],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    packages = {folder_of(package): package for package in SETTINGS["packages"]}
    paths = [PurePath(line) for line in listed.splitlines() if (ROOT / line).exists()]
    assert len(paths) > 100
    lost = []
    for path in paths:
        package = packages.get(path.parent.as_posix(), "")
        patterns = SETTINGS["package-data"].get(package, [])
        installed = path.suffix == ".py" or any(fnmatch(path.name, each) for each in patterns)
        for_readers = path.name == "README.md" or path.suffix == ".svg"
        if installed == for_readers:
            lost.append(str(path))
    assert not lost, f"in the wheel: [tool.setuptools.package-data] must name {lost}"


def test_the_top_of_the_checkout_holds_what_it_should():
    """Everything else has a room."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository: git lists its files")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.partition("/")[0] for name in listed}
    rooms = {"fasttta", "kernels", "csrc", "benches", "tests"}
    files = {"pyproject.toml", "README.md", "constraints.txt", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == rooms | files
