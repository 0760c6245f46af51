"""Command lines as documentation has them: whether they would be understood."""

from __future__ import annotations

import shlex
from typing import Any, Final

from typer.main import get_command

from moe_serve.cli.app import app

PROGRAM: Final = "moe-serve"


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
