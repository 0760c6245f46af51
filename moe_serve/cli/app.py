"""The ``moe-serve`` command: finds the subcommand, turns errors into exit codes.

A subcommand's module is imported when it is called: rolling back must not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from moe_serve.cli.output import err
from moe_serve.errors import MoeServeError

COMMANDS: Final = {
    "inspect": ("inspect", "inspect_command"),
    "prune": ("prune", "prune_command"),
    "calibrate": ("calibrate", "calibrate_command"),
    "merge-statistics": ("calibrate", "merge_command"),
    "plan": ("prune", "plan_command"),
    "apply": ("prune", "apply_command"),
    "export": ("files", "export_command"),
    "verify": ("files", "verify_command"),
    "audit": ("audit", "audit_command"),
    "compare": ("compare", "compare_command"),
    "report": ("report", "report_command"),
    "pilot": ("pilot", "pilot_command"),
    "up": ("up", "up_command"),
    "keys": ("keys", "keys"),
    "rollout": ("rollout", "rollout"),
    "demo": ("demo", "demo_command"),
}
"""Name → module of this package and what it exports: a function or a group."""


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        """Import and build one command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        target = getattr(importlib.import_module(f"moe_serve.cli.{module}"), name)
        if isinstance(target, typer.Typer):
            return get_command(target)
        single = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command(cmd_name)(target)
        return get_command(single)


app = typer.Typer(
    name="moe-serve",
    cls=LazyGroup,
    help="Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root() -> None:
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
