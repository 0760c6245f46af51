"""``rollout``: where traffic goes, moving it, and rollouts by policy. Needs the state directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_serve.cli.output import err, out, print_json
from moe_serve.errors import UsageError
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Moved, move, status
from moe_serve.serving.state import StackState

if TYPE_CHECKING:
    # Rolling back must not wait for what only a simulation imports.
    from moe_serve.rollout.simulation import Summary

State = Annotated[Path, typer.Option("--state", help="The --state directory of moe-serve up.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the record.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Policy = Annotated[Path | None, typer.Option("--policy", help="policy.toml.")]

rollout = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Drive a running stack: move traffic by hand or by policy, and back.",
)


@rollout.command("status")
def status_command(state: State = Path("moe-serve-state"), as_json: Json = False) -> None:
    """Show where traffic goes, and what a rollout waits for."""
    found = status(state)
    if as_json:
        print_json(found)
        return
    out.print(f"{found['state']}: {found['pruned_percent']:g} % of requests go to the pruned model")
    if found["shadow_percent"]:
        out.print(f"{found['shadow_percent']:g} % of requests are copied to the pruned model")
    words = {True: "in force", False: "NOT in force", None: "unknown, Envoy does not answer"}
    out.print(f"routes {found['version']}: {words[found['in_force']]}")
    if found["edited_by_hand"]:
        out.print("the route file was changed by something else than this program")
    if found["reason"]:
        out.print(f"why: {found['reason']}", markup=False)
    if decision := found["decision"]:
        _show_decision(decision)
    if found["decision"] and found["controller"] is None:
        out.print("NOBODY WATCHES: the controller is gone")
    if last := found["last_change"]:
        out.print(
            f"last change: {last['decision']} by {last['actor']} ({last['reason'] or 'no reason'})",
            markup=False,
        )


def _show_decision(decision: dict[str, Any]) -> None:
    """What was decided last, and each guard as an interval against its margin."""
    out.print(f"{decision['kind']} ({decision['reason']}): {decision['words']}", markup=False)
    for guard in decision["evidence"]:
        k, n = guard["pruned"]
        ko, no = guard["original"]
        counts = f"pruned {k:.0f} of {n:.0f}, original {ko:.0f} of {no:.0f}"
        waits = f"; waits for {guard['needs']}" if guard["needs"] else ""
        out.print(
            f"  {guard['guard']:<15}{guard['verdict']:<6}"
            f"{guard['lower']:+.4f} to {guard['upper']:+.4f}, margin {guard['margin']:g}; "
            f"{guard['said'] or counts} ({guard['basis']}){waits}",
            markup=False,
            soft_wrap=True,
        )


@rollout.command("start")
def start_command(
    state: State = Path("moe-serve-state"),
    policy: Policy = None,
    reason: Reason = "",
    force: Annotated[bool, typer.Option(help="Also shortly after a rollback.")] = False,
    as_json: Json = False,
) -> None:
    """Begin a rollout by policy.

    It goes step by step; a step is left when harm beyond the margins is excluded.
    """
    from moe_serve.rollout.commands import start_rollout
    from moe_serve.rollout.policy import Policy as Rules
    from moe_serve.rollout.policy import load_policy

    path = policy or StackState.load(state).policy
    rules = load_policy(Path(path)) if path is not None else Rules()
    _show(start_rollout(state, rules, reason=reason, force=force), as_json=as_json)


@rollout.command("set")
def set_command(
    weight: Annotated[float, typer.Argument(help="Share of the pruned variant, 0 to 100.")],
    state: State = Path("moe-serve-state"),
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Give the pruned variant a share of the traffic. Pauses a rollout."""
    _show(move(state, weight, decision="set", reason=reason), as_json=as_json)


@rollout.command("pause")
def pause_command(state: State = Path("moe-serve-state"), reason: Reason = "") -> None:
    """Keep the share as it is; guards go on watching."""
    from moe_serve.rollout.commands import pause_rollout

    pause_rollout(state, reason=reason)


@rollout.command("resume")
def resume_command(
    state: State = Path("moe-serve-state"), reason: Reason = "", as_json: Json = False
) -> None:
    """Go on after a pause, or open a step's gate."""
    from moe_serve.rollout.commands import resume_rollout

    moved = resume_rollout(state, reason=reason)
    if moved is not None:
        _show(moved, as_json=as_json)


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
    """Send everything to the original, at once.

    Works with the control process dead.
    """
    _show(move(state, 0.0, decision="rollback", reason=reason), as_json=as_json)


@rollout.command("history")
def history_command(
    state: State = Path("moe-serve-state"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the log's hashes; exit 1 if one is wrong.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the changes on record, newest first."""
    StackState.load(state)
    store = Store(state)
    if verify:
        _verify(store, as_json=as_json)
        return
    changes = store.history()
    if as_json:
        print_json({"changes": [c.to_json() for c in changes]})
        return
    for c in changes:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.at))
        fate = "" if c.confirmed_at else "  (not confirmed)"
        fate = "  (given up)" if c.abandoned_at else fate
        before = "?" if c.percent_before is None else f"{c.percent_before:g}"
        out.print(f"{when}  {c.decision}  {before} → {c.percent_after:g} %  {c.actor}{fate}")
        if c.reason:
            out.print(f"    {c.reason}", markup=False, soft_wrap=True)


@rollout.command("simulate")
def simulate_command(
    policy: Annotated[
        Path | None, typer.Argument(help="policy.toml; without one the default policy.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests per second, mean over a day.")] = 20.0,
    rollouts: Annotated[int, typer.Option(help="Per scenario.")] = 100,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal traffic.")] = 0,
    as_json: Json = False,
) -> None:
    """Play a policy against made-up traffic.

    Beside it stands a policy of fixed thresholds on the same traffic.
    """
    from moe_serve.rollout.policy import Policy as Rules
    from moe_serve.rollout.policy import load_policy
    from moe_serve.rollout.simulation import scenarios, simulate, summarise

    if rollouts < 1 or rate <= 0.0:
        raise UsageError(
            "rollouts and rate must be above zero",
            where="rollout simulate",
            remedy="give --rollouts 1 and --rate 0.1 or more",
        )
    rules = load_policy(policy) if policy is not None else Rules()
    rows = []
    for name, scenario in scenarios(rules, rate).items():
        err.print(f"{name}: {rollouts} rollouts", markup=False)
        ours, fixed = simulate(rules, scenario, rollouts, seed)
        rows += [summarise(name, "policy", ours), summarise(name, "thresholds", fixed)]
    if as_json:
        print_json({"policy": rules.digest, "scenarios": [row.to_json() for row in rows]})
    else:
        out.print(_table(rows))


@rollout.command("dependence")
def dependence_command(
    state: State = Path("moe-serve-state"),
    seconds: Annotated[
        float | None,
        typer.Option(help="A long request takes this; without it the slowest tenth does."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how alike a user's requests are.

    From what the proxy noted of users it can tell apart; for ``dependence`` in policy.toml.
    """
    from moe_serve.rollout.dependence import alike
    from moe_serve.serving.listener import users_file

    StackState.load(state)
    try:
        found = alike(users_file(state), seconds)
    except OSError as exc:
        raise UsageError(
            f"cannot be read ({exc.strerror})",
            where=str(users_file(state)),
            remedy="the proxy writes it; start the stack, and send requests that name their users",
        ) from exc
    ends = {x.what: x.at_most for x in found if x.at_most is not None}
    advised = max((end for what, end in ends.items() if what != "left"), default=None)
    patience = max(ends.values(), default=None) if "left" in ends else None
    if as_json:
        advice = {"dependence": advised, "with_abandoned": patience}
        print_json({**advice, "alike": [one.to_json() for one in found]})
        return
    table = Table("requests that", "of", "users", "happened", "correlation", "at most, 95 %")
    for one in found:
        figures = ["too few"] * 2 if one.correlation is None else []
        figures = figures or [f"{one.correlation:.4f}", f"{one.at_most:.4f}"]
        told = {"failed": "failed", "slow": "took long", "left": "were given up"}[one.what]
        counts = (f"{one.requests:,}", f"{one.users:,}", f"{one.events:,}")
        table.add_row(told, *counts, *figures)
    out.print(table)
    out.print(
        f"in policy.toml: dependence = {advised:.3f}"
        if advised is not None
        else "too little to say anything: keep the default, and look again when there is more"
    )
    if patience is not None:
        out.print(f"with the guard abandoned: dependence = {patience:.3f}")


def _table(rows: list[Summary]) -> Table:
    table = Table("traffic", "policy", "promoted", "rolled back", "paused", "hours", "exposed")
    for row in rows:
        table.add_row(
            row.scenario,
            row.policy,
            f"{row.promoted:.1%}",
            f"{row.rolled_back:.1%}",
            f"{row.paused + row.unfinished:.1%}",
            f"{row.hours:.1f}",
            f"{row.exposed:,.0f}",
        )
    return table


def _verify(store: Store, *, as_json: bool) -> None:
    found = store.verify()
    if as_json:
        print_json({"entries": found.entries, "head": found.head, "problems": list(found.problems)})
    else:
        for problem in found.problems:
            out.print(problem, markup=False)
        out.print(f"{found.entries} entries, last hash {found.head}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


def _show(moved: Moved, *, as_json: bool) -> None:
    for warning in moved.warnings:
        err.print(f"warning: {warning}", markup=False)
    if as_json:
        print_json(moved.to_json())
        return
    after = moved.effective_seconds
    speed = f", in force after {after * 1000:.0f} ms" if after is not None else ""
    out.print(f"{moved.percent:g} % of requests go to the pruned model{speed}")
