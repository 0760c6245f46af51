"""The page of benchmarks is what the results say; each benchmark in it can be run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import suite
from tests.support.lines import benchmark


def test_the_page_is_current() -> None:
    """``python -m benchmarks.suite --page`` after a result has changed."""
    assert suite.PAGE.read_text(encoding="utf-8") == suite.page()


@pytest.mark.parametrize("name", sorted(suite.SUITE))
def test_commands_take_their_options(name: str) -> None:
    """Otherwise hours of measuring end with a usage message."""
    benchmark(suite.SUITE[name].command)


def test_objects_become_tables() -> None:
    """A line each, in the order of the first one's keys; what differs stays as it is."""
    lines = '{"a": "x", "b": 0.12345}\n{"a": "y", "b": 2}\n{"seconds": 3}'
    table = '| a | b |\n|---|---|\n| x | 0.123 |\n| y | 2 |\n\n`{"seconds": 3}`'
    assert suite.shown(lines) == table
    assert suite.shown("| a |\n|---|") == "| a |\n|---|"
    assert suite.shown('{\n "a": 1\n}') == '```json\n{\n "a": 1\n}\n```'


def test_an_unknown_name_lists_the_known_ones() -> None:
    """And nothing is run."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "choose from quality" in done.stderr
