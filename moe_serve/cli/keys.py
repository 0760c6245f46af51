"""``keys``: who may use the OpenAI endpoint. Needs only the state directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_serve.cli.output import err, out, print_json
from moe_serve.errors import RolloutError, UsageError
from moe_serve.serving.envoy import Admin
from moe_serve.serving.keys import load_keys, new_key, remove_key
from moe_serve.serving.listener import listener_version, put_listener
from moe_serve.serving.locks import is_up
from moe_serve.serving.state import STACK, StackState
from moe_serve.serving.variants import VARIANTS

State = Annotated[Path, typer.Option("--state", help="The --state directory of moe-serve up.")]
Name = Annotated[str, typer.Argument(help="What the key is called in logs and limits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

keys = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="API keys of the OpenAI endpoint. With the first one, nobody comes in without.",
)


@keys.command("add")
def add_command(
    name: Name,
    state: State = Path("moe-serve-state"),
    variant: Annotated[
        str, typer.Option(help="The variant that always answers it; by default as the split says.")
    ] = "",
    pin: Annotated[bool, typer.Option(help="Whether it may choose a variant by header.")] = True,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once; only its hash is kept. Exit 1 where it is not in force yet."""
    if variant not in {"", *VARIANTS}:
        raise UsageError(
            f"{variant!r} is no variant",
            where="--variant",
            remedy="give original or pruned, or leave it out",
        )
    secret = new_key(state, name, variant=variant, pin=pin, requests_per_minute=requests_per_minute)
    in_force = _put_in_force(state)
    if as_json:
        print_json({"name": name, "key": secret})
    else:
        # Alone on stdout, so that it can be piped into a store of secrets.
        print(secret, flush=True)
        err.print("keep it now: only its hash is stored", markup=False)
    if not in_force:
        raise typer.Exit(1)


@keys.command("remove")
def remove_command(name: Name, state: State = Path("moe-serve-state")) -> None:
    """Forget a key: requests with it are refused from now on. Exit 1 where they are not yet."""
    remove_key(state, name)
    if not _put_in_force(state):
        raise typer.Exit(1)


@keys.command("list")
def list_command(state: State = Path("moe-serve-state"), as_json: Json = False) -> None:
    """Names and what each may do; the keys themselves are not known."""
    found = load_keys(state)
    if as_json:
        rows = [{k: v for k, v in asdict(key).items() if k != "sha256"} for key in found or ()]
        print_json({"required": found is not None, "keys": rows})
        return
    if found is None:
        out.print("no keys: whoever reaches the port may use it")
        return
    table = Table("name", "variant", "may choose", "requests a minute")
    for key in found:
        limit = str(key.requests_per_minute or "no limit")
        table.add_row(key.name, key.variant or "as split", "yes" if key.pin else "no", limit)
    out.print(table)


def _put_in_force(state: Path) -> bool:
    """Hand the keys to a proxy that runs; one that starts later reads them.

    Whether none runs that still goes by the keys before.
    """
    if not (state / STACK).exists():
        return True
    stack = StackState.load(state)
    if stack.edge is None:
        return True
    put_listener(state, stack.edge)
    try:
        Admin(stack.admin).confirm_listener(lambda: listener_version(state))
    except RolloutError as exc:
        if isinstance(exc.__cause__, ConnectionRefusedError) and not is_up(state):
            err.print("saved; no proxy runs, the next one reads it", markup=False)
            return True
        err.print(f"saved; not in force yet: {exc}", markup=False)
        return False
    return True
