"""A rollout with the real Envoy, upstreams that speak like engines, and a controller to tick."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from moe_serve.rollout.commands import start_rollout
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.margins import ErrorGuard, Guards, LatencyGuard, ShareGuard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.store import DATABASE
from moe_serve.rollout.traffic import status
from tests.support.proxy import Proxied

QUICK = {"min_seconds": 0.0, "min_requests": 20, "max_seconds": 3600.0}
POLICY = Policy(
    steps=(Step(weight=0, shadow=100, **QUICK), Step(weight=50, **QUICK)),
    guards=Guards(
        errors=ErrorGuard(margin=0.2),
        ttft=LatencyGuard(objective=1.0, margin=0.4),
        tpot=LatencyGuard(objective=0.1, margin=0.4),
        truncated=ShareGuard(margin=0.4),
        empty=ShareGuard(margin=0.4),
        quality="off",
        garbage="off",
    ),
    strata=(),
    warmup_seconds=0.0,
    interval_seconds=0.5,
    blind_seconds=3.0,
)


def ask(proxy: Proxied, count: int) -> None:
    """Requests, eight at a time."""
    with httpx.Client() as client, ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda _: client.post(f"{proxy.endpoint}/completions", json={}), range(count))
        )


@contextmanager
def begun(proxy: Proxied, policy: Policy = POLICY) -> Iterator[Controller]:
    """A controller that has the lease, and a rollout at its first step."""
    controller = Controller(proxy.state, lambda _: None)
    controller.tick()
    start_rollout(proxy.state, policy, reason="test")
    controller.tick()
    yield controller


def until_rolled_back(proxy: Proxied, controller: Controller) -> None:
    """A hundred requests before each tick, twenty ticks at most."""
    for _ in range(20):
        ask(proxy, 100)
        time.sleep(0.1)
        controller.tick()
        if phase(proxy)[0] == "rolled_back":
            break


@contextmanager
def holding(state: Path) -> Iterator[None]:
    """Another program holds the record."""
    db = sqlite3.connect(state / DATABASE, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    yield
    db.execute("ROLLBACK")
    db.close()


def phase(proxy: Proxied) -> tuple[str, float, float]:
    """State, percent, copies."""
    found = status(proxy.state)
    return found["state"], found["pruned_percent"], found["shadow_percent"]
