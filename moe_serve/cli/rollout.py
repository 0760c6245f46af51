"""``rollout``: where traffic goes, and moving it. Needs only the state directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from moe_serve.cli.output import err, out, print_json
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Moved, move, status
from moe_serve.serving.state import StackState

State = Annotated[Path, typer.Option("--state", help="The --state directory of moe-serve up.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the record.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

rollout = typer.Typer(no_args_is_help=True, help="Drive a running stack.")


@rollout.command("status")
def status_command(state: State = Path("moe-serve-state"), as_json: Json = False) -> None:
    """Show where traffic goes and the last change."""
    found = status(state)
    if as_json:
        print_json(found)
        return
    out.print(f"{found['state']}: {found['pruned_percent']:g} % of requests go to the pruned model")
    words = {True: "in force", False: "NOT in force", None: "unknown, Envoy does not answer"}
    out.print(f"routes {found['version']}: {words[found['in_force']]}")
    if found["edited_by_hand"]:
        out.print("the route file was changed by something else than this program")
    if last := found["last_change"]:
        out.print(
            f"last change: {last['decision']} by {last['actor']} ({last['reason'] or 'no reason'})"
        )


@rollout.command("set")
def set_command(
    weight: Annotated[float, typer.Argument(help="Share of the pruned variant, 0 to 100.")],
    state: State = Path("moe-serve-state"),
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Give the pruned variant a share of the traffic."""
    _show(move(state, weight, decision="set", reason=reason), as_json=as_json)


@rollout.command("promote")
def promote_command(
    state: State = Path("moe-serve-state"), reason: Reason = "", as_json: Json = False
) -> None:
    """Send everything to the pruned variant."""
    _show(move(state, 100.0, decision="promote", reason=reason), as_json=as_json)


@rollout.command("rollback")
def rollback_command(
    state: State = Path("moe-serve-state"), reason: Reason = "", as_json: Json = False
) -> None:
    """Send everything to the original, at once; works with the control process dead."""
    _show(move(state, 0.0, decision="rollback", reason=reason), as_json=as_json)


@rollout.command("history")
def history_command(state: State = Path("moe-serve-state"), as_json: Json = False) -> None:
    """List the changes on record, newest first."""
    StackState.load(state)
    changes = Store(state).history()
    if as_json:
        print_json({"changes": [c.to_json() for c in changes]})
        return
    for c in changes:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.at))
        confirmed = "" if c.confirmed_at else "  (not confirmed)"
        before = "?" if c.percent_before is None else f"{c.percent_before:g}"
        out.print(f"{when}  {c.decision}  {before} → {c.percent_after:g} %  {c.actor}{confirmed}")


def _show(moved: Moved, *, as_json: bool) -> None:
    for warning in moved.warnings:
        err.print(f"warning: {warning}", markup=False)
    if as_json:
        print_json(moved.to_json())
        return
    after = moved.effective_seconds
    speed = f", in force after {after * 1000:.0f} ms" if after is not None else ""
    out.print(f"{moved.percent:g} % of requests go to the pruned model{speed}")
