"""The ``moe-serve`` command: collects the subcommands and turns errors into exit codes."""

from __future__ import annotations

import sys

import click
import typer

from moe_serve.cli.files import export_command, verify_command
from moe_serve.cli.output import err
from moe_serve.cli.prune import apply_command, calibrate_command, plan_command, prune_command
from moe_serve.errors import MoeServeError

app = typer.Typer(
    name="moe-serve",
    help="Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("prune")(prune_command)
app.command("calibrate")(calibrate_command)
app.command("plan")(plan_command)
app.command("apply")(apply_command)
app.command("export")(export_command)
app.command("verify")(verify_command)


def main() -> None:
    """Run the command line; exit 0 done, 1 check failed, 2 unusable input, 130 interrupted."""
    try:
        app()
    except MoeServeError as exc:
        err.print(f"error: {exc}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        err.print("interrupted; run the same command again to resume", markup=False)
        sys.exit(130)
