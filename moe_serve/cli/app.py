"""The ``moe-serve`` command: finds the subcommand, turns errors into exit codes.

A subcommand's module is imported when it is called: rolling back must not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from itertools import groupby
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from moe_serve.cli.commands import COMMANDS, EXAMPLES
from moe_serve.cli.output import err
from moe_serve.errors import MoeServeError
from moe_serve.version import __version__


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is asked for, not to list or complete it."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        """Import and build one command."""
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        target = getattr(importlib.import_module(f"moe_serve.cli.{entry.module}"), entry.name)
        if isinstance(target, typer.Typer):
            command = get_command(target)
        else:
            single = typer.Typer(
                add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
            )
            single.command(cmd_name)(target)
            command = get_command(single)
        _teach(command, cmd_name)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - click's signature
        """List them by section."""
        for section, entries in groupby(COMMANDS.items(), lambda item: item[1].section):
            with formatter.section(section):
                formatter.write_dl([(name, entry.summary) for name, entry in entries])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Options of this level, then commands by what they begin with."""
        item = importlib.import_module("typer._click.shell_completion").CompletionItem
        return [
            *(item(n, help=e.summary) for n, e in COMMANDS.items() if n.startswith(incomplete)),
            *(super(TyperGroup, self).shell_complete(ctx, incomplete)),
        ]


def _teach(command: Any, path: str) -> None:
    """End a command's help, and those of its subcommands, with its examples."""
    if lines := EXAMPLES[path]:
        # \b: the lines are not to be filled.
        command.epilog = "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))
    for name, below in getattr(command, "commands", {}).items():
        _teach(below, f"{path} {name}")


app = typer.Typer(
    name="moe-serve",
    cls=LazyGroup,
    help="Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(
    epilog="\b\n"
    + "\n".join(("For example:", *(f"  {line}" for line in EXAMPLES[""])))
    + "\n\nmoe-serve COMMAND --help explains each one. Exit codes: 0 done, 1 a check failed, "
    "2 unusable input, 130 interrupted."
)
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely."""


def main() -> None:
    """Run the command line; exit 0 done, 1 check failed, 2 unusable input, 130 interrupted."""
    try:
        app()
    except MoeServeError as exc:
        err.print(f"error: {exc}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to resume", markup=False)
        sys.exit(130)
