"""README and docs name files and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from moe_serve.cli.commands import COMMANDS

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    """Relative links, files of the repository in code, benchmarks, and commands."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:moe_serve|tests|deploy|scripts|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for command in re.findall(r"`moe-serve ([a-z][a-z-]*)", text):
        assert command in COMMANDS, command


def test_every_command_is_in_the_readme() -> None:
    """In its table, or beside the one whose step it is."""
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in table] == []
