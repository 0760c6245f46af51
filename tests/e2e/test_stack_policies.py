"""Rollouts by policy of real engines: healthy, slowed and ruined ones."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from moe_serve.demo.clients import Load, client
from moe_serve.serving.engine import EngineSpec, is_ready
from moe_serve.serving.variants import PRUNED, VARIANTS
from tests.support.ruined import ruin
from tests.support.running import Running


def test_a_rollout_by_policy_counts_what_real_engines_answer(stack: Running) -> None:
    """Both latencies and the failures of both variants, each seen once and as usable data."""
    assert stack.rollout("start")["pruned_percent"] == 50
    with client(stack.endpoint) as openai:
        until = time.monotonic() + 120
        while True:
            openai.completions.create(model="fixture", prompt="x", max_tokens=4)
            found = stack.rollout("status")
            guards = {e["guard"]: e for e in (found["decision"] or {}).get("evidence", ())}
            counted = [guards[g][v][1] for g in guards for v in VARIANTS]
            if len(guards) == 9 and min(counted) > 0:
                break
            assert time.monotonic() < until, found
    assert (found["state"], found["decision"]["reason"]) == ("canary", "evidence")
    assert all(e["pruned"][0] == 0 for name, e in guards.items() if name == "errors")
    text = httpx.get(stack.info["metrics"], timeout=30).text
    assert "moe_serve_rollout_step 0.0" in text
    assert 'moe_serve_guard_difference{bound="lower",guard="tpot"}' in text
    assert 'moe_serve_quality_kl_nats{domain="' in text
    assert 'moe_serve_quality_top1_agreement_ratio{domain="' in text
    url = f"{stack.info['control']}/api/rollback"
    assert httpx.post(url, json={}).status_code == 401
    answer = httpx.post(url, json={"reason": "seen enough"}, headers=stack.token)
    assert answer.json()["moved"]["effective_seconds"] < 0.5
    assert stack.rollout("status")["state"] == "rolled_back"
    assert "Rolled back" in httpx.get(stack.info["control"]).text
    assert stack.rollout("history", "--verify")["problems"] == []


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Policies that decide within seconds: one probe of each domain, wide margins for traffic."""
    root = tmp_path_factory.mktemp("rules")
    own = resources.files("moe_serve.rollout").joinpath("probes.jsonl").read_text(encoding="utf-8")
    (root / "probes.jsonl").write_text("".join(own.splitlines(keepends=True)[::5]))

    def written(name: str, weights: list[int], more: str) -> Path:
        step = "min_seconds = 0\nmin_requests = 10\n"
        steps = [f"[[steps]]\nweight = {weight}\n{step}" for weight in weights]
        path = root / f"{name}.toml"
        path.write_text(QUICK + more + "".join(steps))
        return path

    return written


QUICK = """
warmup_seconds = 0
interval_seconds = 0.5
strata = []
[guards.errors]
margin = 0.4
[guards.ttft]
objective = 1.0
margin = 0.4
[guards.tpot]
objective = 0.1
margin = 0.4
[guards.truncated]
margin = 0.5
[guards.empty]
margin = 0.5
[guards.abandoned]
margin = 0.5
[guards.garbage]
margin = 0.7
[probes]
texts = "probes.jsonl"
default = false
tokens = 32
"""


def decided(stack: Running, rules: Path, phase: str, tokens: int = 8) -> dict[str, Any]:
    """Roll out under load until that phase; return the evidence of the last decision, by guard."""
    stack.rollout("start", "--policy", str(rules), "--force")
    with Load(endpoint=stack.endpoint, model="fixture", streams=6, tokens=tokens) as load:
        until = time.monotonic() + 240  # A guard against hanging; it takes some ten seconds.
        while (found := stack.rollout("status"))["state"] != phase:
            assert found["state"] not in ("rolled_back", "paused"), found["last_change"]
            assert time.monotonic() < until, found["decision"]
            time.sleep(0.5)
    assert load.failed == 0
    with sqlite3.connect(Path(stack.info["state"]) / "rollout.sqlite3") as db:
        (text,) = db.execute("SELECT evidence FROM changes ORDER BY id DESC").fetchone()
    db.close()
    return {guard["guard"]: guard for guard in json.loads(text)["evidence"]}


def test_a_healthy_pruned_model_is_promoted(stack: Running, rules: Callable[..., Path]) -> None:
    """Probes alone, half of the traffic, all of it; each guard has excluded harm."""
    policy = rules("healthy", [0, 50], "interval_seconds = 0.2\n")
    found = decided(stack, policy, "promoted")
    assert {guard["verdict"] for guard in found.values()} == {"fine"}
    assert {"errors", "ttft", "tpot", "quality-kl", "quality-top1", "garbage"} < found.keys()
    assert 0.0 < found["quality-kl"]["upper"] < 0.25
    stack.rollout("rollback")


def test_a_slowed_model_is_rolled_back_by_a_latency(
    stack: Running, rules: Callable[..., Path]
) -> None:
    """The pruned engine's processes run 0.02 s, then stand still for 0.3 s; it errs no more."""
    path = rules("slowed", [50], "")
    path.write_text(path.read_text().replace("[guards.garbage]\nmargin = 0.7", ONLY_TRAFFIC))
    pid = json.loads((Path(stack.info["state"]) / "stack.json").read_text())["engines"]
    parent = psutil.Process(pid[PRUNED]["pid"])
    processes = [parent, *parent.children(recursive=True)]
    done = threading.Event()

    def hold() -> None:
        while not done.is_set():
            for process in processes:
                process.suspend()
            done.wait(0.3)
            for process in processes:
                process.resume()
            time.sleep(0.02)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        found = decided(stack, path, "rolled_back", tokens=4)
    finally:
        done.set()
        thread.join()
    assert "harm" in {found["tpot"]["verdict"], found["ttft"]["verdict"]}
    assert found["errors"]["verdict"] != "harm"


ONLY_TRAFFIC = "[hard]\nunhealthy_seconds = 600\n[guards]\nquality = 'off'\ngarbage = 'off'"
"""On a slow machine an engine that stands still so often also fails its health checks."""


def test_ruined_experts_are_rolled_back_by_their_quality(
    stack: Running, rules: Callable[..., Path], tmp_path: Path, later: ExitStack
) -> None:
    """Another engine in the pruned one's place: as fast, as free of errors, and nonsense."""
    state = Path(stack.info["state"])
    engine = json.loads((state / "stack.json").read_text())["engines"][PRUNED]
    for process in [*(p := psutil.Process(engine["pid"])).children(recursive=True), p]:
        process.kill()
    ruin(Path(engine["model"]), tmp_path / "ruined")
    spec = EngineSpec(
        variant=PRUNED,
        model=tmp_path / "ruined",
        served_model="fixture",
        port=int(engine["url"].rsplit(":", 1)[1]),
        log=tmp_path / "ruined.log",
    )
    child = spec.launch(gpu=False)
    later.callback(child.stop, 5)
    while not is_ready(spec, child):
        time.sleep(0.2)
    found = decided(stack, rules("ruined", [50], "interval_seconds = 6\n"), "rolled_back")
    harm = {name for name, guard in found.items() if guard["verdict"] == "harm"}
    assert harm
    assert harm <= {"quality-kl", "quality-top1", "quality-domain"}, found
    assert stack.rollout("history", "--verify")["problems"] == []
