"""The review of dependencies against what is declared and installed."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
LICENCES: Final = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "MPL-2.0"}
"""Those that let the package be used and passed on under Apache-2.0."""


def declared() -> dict[str, set[str]]:
    """Part of ``pyproject.toml`` → names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = {"": project["dependencies"], **project["optional-dependencies"]}
    return {part: {re.split(r"[\[<>=~! ]", d)[0] for d in found} for part, found in parts.items()}


def reviewed() -> dict[str, dict[str, str]]:
    """Section of the page → package → its licence."""
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for row in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
            cells = row.split(" | ")
            licence = next(cell for cell in cells if cell in LICENCES)
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found.setdefault(section.partition("\n")[0], {})[name] = licence
    return found


def test_every_dependency_is_reviewed() -> None:
    """Those of the package, of its extras and of its development, and no other."""
    parts, page = declared(), reviewed()
    assert set(page["What it runs on"]) == parts[""]
    assert set(page["For development"]) == parts["dev"]
    extras = set().union(*(names for part, names in parts.items() if part not in {"", "dev"}))
    assert set(page["Extras"]) == extras - parts[""]


def test_licences_are_what_the_packages_say() -> None:
    """By the kind that their metadata name."""
    for packages in reviewed().values():
        for name, licence in packages.items():
            try:
                found = metadata(name)
            except PackageNotFoundError:
                continue  # vLLM's two builds exclude each other.
            said = [*(found.get_all("License-Expression") or ()), *(found.get_all("License") or ())]
            said += [c for c in found.get_all("Classifier") or () if c.startswith("License")]
            kind = licence.partition("-")[0]
            assert any(kind in text for text in said), f"{name}: {said}"


def test_what_is_declared_is_imported() -> None:
    """A package that no code of ours names is not needed."""
    modules = {"nvidia-ml-py": "pynvml", "prometheus-client": "prometheus_client"}
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "moe_serve").rglob("*.py"))
    for name in declared()[""]:
        module = modules.get(name, name)
        assert re.search(rf"^\s*(import|from) {module}\b", sources, re.MULTILINE), name
