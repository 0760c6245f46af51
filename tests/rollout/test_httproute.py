"""A rollout whose split is in an HTTPRoute: the same record, the same decisions, another place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import httpx
import pytest

from moe_serve.errors import OutputError, RolloutError
from moe_serve.metrics.memory import process_tree
from moe_serve.rollout.commands import start_rollout
from moe_serve.rollout.margins import Guards, ShareGuard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.recovery import recover
from moe_serve.rollout.sources import sources_of
from moe_serve.rollout.state import State
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Basis, move, status
from moe_serve.serving import httproute
from moe_serve.serving.ports import free_port
from moe_serve.serving.routing import routing_of
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.cluster import Cluster, deployed
from tests.support.stacks import fake_stack
from tests.support.upstream import Upstream

MODEL: Final = Path(__file__).parents[2] / "benchmarks" / "fixtures" / "qwen3moe-7m"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The route of ``deploy/``; nothing is slow."""
    with deployed(tmp_path, monkeypatch) as found:
        yield found


def stack(state: Path, *, restores: bool = False) -> Path:
    """A state directory whose split is in the cluster."""
    state.mkdir(exist_ok=True)
    fake_stack(state)
    engines = {
        name: EngineState(url=f"http://{name}:8000", model="m") for name in (ORIGINAL, PRUNED)
    }
    found = StackState.load(state)
    replace(
        found, engines=engines, http_route="moe-serve/openai", http_route_restores=restores
    ).save(state)
    return state


def under_way(state: Path) -> Store:
    """At 5 %, by a policy with one more step."""
    store = Store(state)
    store.lease("someone", 600.0)
    policy = Policy(steps=(Step(weight=5), Step(weight=25)), sticky="off")
    start_rollout(state, policy, reason="", actor="me")
    return store


def test_a_move_is_recorded_written_and_confirmed(cluster: Cluster, tmp_path: Path) -> None:
    """As with a file; the version of the record is the annotation's."""
    state = stack(tmp_path / "s")
    moved = move(state, 25, decision="set", reason="")
    assert cluster.weights()[2] == [7500, 2500]
    assert moved.warnings == ()
    assert moved.effective_seconds is not None
    last = Store(state).history()[0]
    assert cluster.route is not None
    noted = cluster.route["metadata"]["annotations"][httproute.VERSION]
    assert (last.version, last.percent_after) == (noted, 25.0)
    assert last.confirmed_at is not None
    assert last.hash_after == httproute.HttpRoute.digest_of(routing_of(state).read())
    found = status(state)
    assert (found["in_force"], found["pruned_percent"], found["edited_by_hand"]) == (
        True,
        25.0,
        False,
    )


def test_weights_that_a_person_sets_stay_and_pause(cluster: Cluster, tmp_path: Path) -> None:
    """It is said by whom; 0 % is a rollback."""
    state = stack(tmp_path / "s")
    store = under_way(state)
    cluster.reweigh(6000, 4000, "kubectl-edit")
    assert recover(state) == ("the HTTPRoute was changed by kubectl-edit: 40 %",)
    assert recover(state) == ("edited to 40 % is in force",)
    assert recover(state) == ()
    assert store.saved().state.phase == "paused"
    assert cluster.weights()[2] == [6000, 4000]
    cluster.reweigh(10_000, 0)
    recover(state)
    assert store.saved().state.phase == "rolled_back"


def test_weights_that_a_deployment_tool_resets_are_put_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Where the stack says so: the rollout goes on, with what was found and by whom on record."""
    state = stack(tmp_path / "s", restores=True)
    store = under_way(state)
    before = store.saved()
    cluster.reweigh(10_000, 0, "argocd-controller")
    words = "the HTTPRoute was changed by argocd-controller: 0 %; put back to 5 %"
    assert recover(state) == (words,)
    assert cluster.weights()[2] == [9500, 500]
    assert store.saved() == before
    entry = next(e for e in store.log() if e.kind == "restored")
    assert entry.body["words"] == words
    assert recover(state) == ()
    assert store.verify().problems == ()


def test_a_rollback_that_could_not_be_written_is_written_later(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The API server is away, the pod dies; the next one reads the record and carries it out."""
    state = stack(tmp_path / "s")
    store = under_way(state)
    cluster.down = True
    with pytest.raises(OutputError, match="goes on with the weights it has"):
        move(state, 0, decision="rollback", reason="fire")
    cluster.down = False
    assert cluster.weights()[2] == [9500, 500]
    assert "a rollback that was only intended is carried out" in recover(state)
    assert cluster.weights()[2] == [10_000, 0]
    assert store.saved().state.phase == "rolled_back"


def test_a_step_that_could_not_be_written_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    """Forbidden: the state before it holds again, and the next recovery finds nothing."""
    state = stack(tmp_path / "s")
    store = under_way(state)
    before = store.saved().state
    basis = Basis(state=State(phase="canary", step=1, began=2.0), revision=store.saved().revision)
    cluster.faults = ["403"]
    with pytest.raises(OutputError, match="we may not"):
        move(state, 25, decision="advance", reason="", basis=basis)
    assert recover(state) == ("advance to 25 % was never written",)
    assert store.saved().state == before
    assert recover(state) == ()


def test_stickiness_is_refused_rather_than_forgotten(cluster: Cluster, tmp_path: Path) -> None:
    """Before anything is recorded."""
    state = stack(tmp_path / "s")
    Store(state).lease("someone", 600.0)
    with pytest.raises(RolloutError, match='sticky = "off"'):
        start_rollout(state, Policy(), reason="", actor="me")
    guards = Guards(abandoned=ShareGuard(margin=0.05))
    with pytest.raises(RolloutError, match='abandoned = "off"'):
        start_rollout(state, Policy(sticky="off", guards=guards), reason="", actor="me")
    assert (cluster.writes, Store(state).history()) == (0, [])


def test_requests_are_counted_by_the_engines(tmp_path: Path) -> None:
    """Answers by class of status; one that falls silent is unhealthy, its counts stay."""
    ports = {ORIGINAL: free_port(), PRUNED: free_port()}
    with (
        Upstream(ORIGINAL, ports[ORIGINAL], chunks=1, pause=0.0),
        Upstream(PRUNED, ports[PRUNED], chunks=1, pause=0.0) as pruned,
    ):
        fake_stack(tmp_path)
        engines = {
            name: EngineState(url=f"http://127.0.0.1:{port}", model="m")
            for name, port in ports.items()
        }
        found = replace(StackState.load(tmp_path), engines=engines, http_route="a/b")
        sources = sources_of(Policy(), found)
        pruned.fail_every = 4
        for _ in range(8):
            httpx.post(f"http://127.0.0.1:{ports[PRUNED]}/v1/completions", json={})
        arm = sources.read(Policy()).arms[PRUNED]
        assert (arm.requests, arm.failed, arm.healthy) == (8, 2, True)
        assert arm.counts_probes
        pruned.die()
        arm = sources.read(Policy()).arms[PRUNED]
        assert (arm.requests, arm.failed, arm.healthy) == (8, 2, False)


def test_a_pod_that_dies_is_followed_by_one_that_knows(cluster: Cluster, tmp_path: Path) -> None:
    """Killed and started again on the same volume: record and weights are as they were.

    ``up`` starts no proxy; the command moves the weights. Both engines are on this machine, so the
    Services of the route have this machine's two names.
    """
    names = {ORIGINAL: "127", PRUNED: "localhost"}
    assert cluster.route is not None
    for rule in cluster.route["spec"]["rules"]:
        for backend in rule["backendRefs"]:
            backend["name"] = names[backend["name"]]
    state, ports = tmp_path / "state", {ORIGINAL: free_port(), PRUNED: free_port()}
    settings = [f'{name} = "{MODEL}"' for name in ports]
    settings += [
        f'{name}_url = "http://{host}:{ports[name]}"'
        for name, host in ((ORIGINAL, "127.0.0.1"), (PRUNED, "localhost"))
    ]
    settings += ['http_route = "moe-serve/openai"', f'state = "{state}"', 'model = "m"']
    (tmp_path / "stack.toml").write_text("\n".join([*settings, f"control_port = {free_port()}"]))
    with Upstream(ORIGINAL, ports[ORIGINAL]), Upstream(PRUNED, ports[PRUNED]):
        with up(tmp_path) as first:
            move(state, 25, decision="set", reason="before")
            for process in process_tree(first.pid):
                os.kill(process, signal.SIGKILL)
        with up(tmp_path):
            assert cluster.weights()[2] == [7500, 2500]
            assert recover(state) == ()
            assert [c.reason for c in Store(state).history()] == ["before"]
            moved = move(state, 0, decision="rollback", reason="after")
            assert (moved.before, cluster.weights()[2]) == (25.0, [10_000, 0])
            metrics = httpx.get(f"{StackState.load(state).control}/metrics", timeout=60).text
            assert 'moe_serve_traffic_weight_ratio{model="m",variant="original"} 1.0' in metrics
    assert cluster.weights()[2] == [10_000, 0]


@contextmanager
def up(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``moe-serve up`` until it says that it serves; ended at the end."""
    told = folder / "told"
    with told.open("wb") as out, (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "moe_serve", "up", str(folder / "stack.toml"), "--json"]
        child = subprocess.Popen(command, stdout=out, stderr=log)
    try:
        until = time.monotonic() + 60
        while b"HTTPRoute moe-serve/openai" not in told.read_bytes():
            assert child.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield child
    finally:
        child.terminate()
        child.wait(60)
