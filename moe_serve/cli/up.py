"""``up``: engines, Envoy and control on this machine."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from moe_serve.cli import options
from moe_serve.cli.output import print_json
from moe_serve.errors import RolloutError, ServingError
from moe_serve.rollout.policy import load_policy
from moe_serve.rollout.probes import load_probes
from moe_serve.serving.config import load_stack_config
from moe_serve.serving.listener import trim_users
from moe_serve.serving.sharing import Rest
from moe_serve.serving.stack import Stack, bring_up
from moe_serve.serving.state import StackState
from moe_serve.serving.token import token_file


class _Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def up_command(
    config: Annotated[
        Path | None, typer.Argument(help="stack.toml; options given beside it come first.")
    ] = None,
    original: Annotated[Path | None, typer.Option(help="The original checkpoint.")] = None,
    pruned: Annotated[Path | None, typer.Option(help="The pruned checkpoint.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Of the OpenAI endpoint; by default 8000.")
    ] = None,
    control_port: Annotated[
        int | None, typer.Option(help="Of page, API and metrics; by default 8001.")
    ] = None,
    control_host: Annotated[
        str | None, typer.Option(help="Address of page, API and metrics; loopback by default.")
    ] = None,
    control_name: Annotated[
        list[str] | None, typer.Option(help="A host name they answer to. Repeatable.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Directory for routes, record and logs; by default moe-serve-state."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="policy.toml: watch, and decide once rollout start is told.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The public model name; by default the original folder's.")
    ] = None,
    share_gpu: Annotated[
        bool,
        typer.Option(
            "--share-gpu",
            help="Both engines on one GPU; the original sleeps while pruned has all traffic.",
        ),
    ] = False,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="One more argument for both engines. Repeatable.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Serve original and pruned behind one OpenAI-compatible port until stopped."""
    settings = load_stack_config(
        config,
        {
            "original": original,
            "pruned": pruned,
            "port": port,
            "control_port": control_port,
            "control_host": control_host,
            "control_names": tuple(control_name) if control_name else None,
            "state": state,
            "policy": policy,
            "model": model,
            "share_gpu": share_gpu or None,
            "engine_args": tuple(engine_arg) if engine_arg else None,
        },
    )

    if settings.policy is not None:
        rules = load_policy(settings.policy)
        if rules.guards.probed:
            load_probes(rules.probes)

    def stop(_number: int, _frame: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        stack = bring_up(settings, _tell)
    except _Stopped:
        raise typer.Exit(130) from None
    try:
        # Where nobody can read it, it serves all the same.
        with suppress(OSError):
            _announce(stack, as_json=as_json)
        _watch(stack)
    except _Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = stack.drain(_tell)
        _tell("stopped" if not left else f"stopped with {left} requests cut off")
    finally:
        stack.stop()


def _announce(stack: Stack, *, as_json: bool) -> None:
    state: StackState | None = stack.state
    if state is None:
        raise ServingError(
            "the stack has no state",
            where="moe-serve up",
            remedy="report it: the stack came up without saying where",
        )
    if as_json:
        print_json(
            {
                "endpoint": state.endpoint,
                "control": state.control,
                "metrics": f"{state.control}/metrics",
                "token_file": str(token_file(stack.folder)),
                "engines": {name: engine.url for name, engine in state.engines.items()},
                "envoy": {"pid": state.envoy_pid, "admin": f"http://{state.admin}"},
                "state": str(stack.folder),
            }
        )
        return
    told = [
        f"OpenAI endpoint  {state.endpoint}   (model {state.served_model})",
        f"page, API        {state.control}   (metrics {state.control}/metrics)",
        f"their token      is in {token_file(stack.folder)}",
        f"move traffic     moe-serve rollout set 50 --state {stack.folder}",
    ]
    if state.policy is not None:
        told.append(f"automatic        moe-serve rollout start --state {stack.folder}")
    told.append(f"roll back        moe-serve rollout rollback --state {stack.folder}")
    # Not by rich: a command that is broken over lines can't be copied.
    print("\n".join(told), flush=True)


def _watch(stack: Stack) -> None:
    """Say what ended; the proxy sends everything to the engine that is left."""
    told: set[str] = set()
    state = stack.state
    rest = Rest(folder=stack.folder, stack=state) if state and state.shares_gpu else None
    while True:
        if rest is not None:
            _tend(rest, told)
        trim_users(stack.folder)
        stack.revive(_tell)
        for child in stack.ended():
            if child.name not in told and child.name != "control":
                told.add(child.name)
                _tell(f"{child.name} ended with exit code {child.exit_code}:\n{child.tail()}")
            if child.name == "envoy":
                raise ServingError(
                    "the proxy ended", where="envoy", remedy=f"its log is {child.log}"
                )
        time.sleep(0.5)


def _tend(rest: Rest, told: set[str]) -> None:
    """Let the original sleep or wake; each trouble is said once."""
    try:
        if (done := rest.tend()) is not None:
            _tell(done)
    except RolloutError as exc:
        if str(exc) not in told:
            told.add(str(exc))
            _tell(str(exc))


def _tell(text: str) -> None:
    """Say it if that can be done: neither a full disk nor a reader that is gone ends serving."""
    # Not by rich, which ends the process at a broken pipe and keeps whatever it could not write.
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
