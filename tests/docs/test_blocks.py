"""Blocks of commands: each runs in a test or says why not, and every command in one exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.lines import ROOT, benchmark, check

PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN: Final = {"tutorial.md", "tutorial.ja.md"}
"""Pages whose blocks tests/e2e run, save those marked; the translation has the same ones."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The line above each block of shell commands, and the block with continued lines joined."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(
        r"(?:^|(?<=\n))(?P<above>[^\n]*)\n```sh\n(?P<body>.*?)```", text, re.DOTALL
    ):
        yield found["above"], found["body"].replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    """``<!-- not run: reason -->`` right above it; its commands and options exist either way."""
    for above, body in blocks(page):
        assert page.name in RUN or re.fullmatch(r"<!-- not run: .+ -->", above), body
        for line in body.splitlines():
            check(line)


@pytest.mark.parametrize("page", [p for p in PAGES if ".ja." in p.name], ids=lambda p: p.name)
def test_a_translation_has_the_same_commands(page: Path) -> None:
    """In the same order; what is said about them is its own."""

    def commands(page: Path) -> list[list[str]]:
        lines = (line for _, body in blocks(page) for line in body.splitlines())
        return [shlex.split(line, comments=True) for line in lines]

    assert commands(page) == commands(page.with_name(page.name.replace(".ja.", ".")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_benchmarks_named_in_a_sentence_take_these_options(page: Path) -> None:
    """Whoever repeats a figure types what stands beside it."""
    for found in re.findall(r"`(python -m benchmarks\.[^`]+)`", page.read_text(encoding="utf-8")):
        benchmark(" ".join(found.split()))


@pytest.mark.parametrize(
    "line",
    ["moe-serve prune A B --kep 1", "python -m benchmarks.nothing", "scripts/none", "gibberish"],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    """Otherwise the tests above would hold nothing."""
    with pytest.raises(Exception, match=r"No such|none|nothing|gibberish"):
        check(line)
