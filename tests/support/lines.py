"""Command lines as documentation has them: whether they would be understood."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from moe_serve.cli.app import app

ROOT: Final = Path(__file__).parents[2]
PROGRAM: Final = "moe-serve"
OTHERS: Final = frozenset(
    ("curl", "docker", "done", "kill", "kubectl", "sleep", "source", "until", "vllm", "wait")
)
"""Programs and words of the shell that are not ours."""


def parse(line: str) -> list[str]:
    """Parse a line of ours without running it; returns the names of its command.

    Raises:
        ClickException: a command, option, value or argument that does not exist, or lacks.
    """
    words = shlex.split(line, comments=True)
    assert words[0] == PROGRAM, line
    command: Any = get_command(app)
    context = command.make_context(PROGRAM, words[1:], resilient_parsing=False)
    path = []
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return path


def check(line: str) -> None:
    """Hold a command against what exists."""
    words = shlex.split(line, comments=True)
    if not words or words[0] in OTHERS:
        return
    if words[0] == "moe-serve":
        parse(line.rstrip("& "))
    elif words[0] == "torchrun":
        parse("moe-serve " + line.partition("-m moe_serve ")[2])
    elif words[0] in {"python", "/usr/bin/python"}:
        assert words[1] == "-m", line
        if words[2] != "pytest":
            benchmark(line)
    else:
        program = ROOT / words[0]
        assert program.stat().st_mode & 0o111, line


def benchmark(line: str) -> None:
    """A module with the options that its source names."""
    words = shlex.split(line)
    source = (ROOT / words[2].replace(".", "/")).with_suffix(".py")
    assert source.exists(), line
    for option in (word.partition("=")[0] for word in words[3:] if word.startswith("--")):
        names = {f'"{option}"', f'"{option.replace("--no-", "--", 1)}"'}
        assert any(name in source.read_text(encoding="utf-8") for name in names), line
