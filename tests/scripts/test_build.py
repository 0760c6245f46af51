"""Wheel and sdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


def build(out: Path, **environment: str) -> dict[str, bytes]:
    """File name → bytes."""
    subprocess.run(
        [ROOT / "scripts" / "build", out],
        env=os.environ | {"MOE_SERVE_VENV": sys.prefix} | environment,
        capture_output=True,
        check=True,
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_builds_are_equal_and_whole(tmp_path: Path) -> None:
    """In another folder, time zone and language: the same bytes; every file of the packages."""
    first = build(tmp_path / "a")
    assert build(tmp_path / "b", TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7") == first
    wheel, sdist = sorted(tmp_path.joinpath("a").iterdir(), key=lambda p: p.suffix != ".whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "moe_serve", "patches"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {name.removeprefix("patches/") for name in listed.stdout.split()}
    assert held == wanted
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "moe_serve/__init__.py"} <= names


def test_the_bill_of_materials_names_every_locked_package(tmp_path: Path) -> None:
    """In CycloneDX, without a date or a number drawn."""
    subprocess.run(
        [ROOT / "scripts" / "sbom", tmp_path],
        env=os.environ | {"MOE_SERVE_VENV": sys.prefix},
        capture_output=True,
        check=True,
    )
    for platform in ("cpu", "cuda"):
        bill = json.loads((tmp_path / f"sbom-{platform}.json").read_text())
        assert bill["bomFormat"] == "CycloneDX"
        assert "serialNumber" not in bill
        assert "timestamp" not in bill["metadata"]
        named = {f"{c['name']}=={c['version']}" for c in bill["components"]}
        lock = (ROOT / "requirements" / f"linux-{platform}.txt").read_text().split()
        assert named == {line for line in lock if "==" in line}
