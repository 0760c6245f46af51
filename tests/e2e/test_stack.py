"""Two real engines, the real Envoy and control process, real clients."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.demo.clients import Load, ask_everything, client
from moe_serve.metrics.catalogue import CATALOGUE
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.serving.engine import EngineSpec, is_ready
from moe_serve.serving.process import free_port
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED, VARIANTS
from tests.support.prometheus import query, scraping
from tests.support.ruined import ruin


@dataclass(frozen=True, kw_only=True)
class Running:
    """A stack started by the command."""

    process: subprocess.Popen[str]
    info: dict[str, Any]

    @property
    def endpoint(self) -> str:
        """The OpenAI endpoint."""
        return str(self.info["endpoint"])

    def rollout(self, *arguments: str) -> dict[str, Any]:
        """Run ``moe-serve rollout … --json``."""
        command = [sys.executable, "-m", "moe_serve", "rollout", *arguments]
        done = subprocess.run(
            [*command, "--state", self.info["state"], "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))


def command(original: Path, pruned: Path, state: Path, *more: str) -> list[str]:
    """``moe-serve up --json``."""
    return [
        *(sys.executable, "-m", "moe_serve", "up", "--json", "--state", str(state)),
        *("--original", str(original), "--pruned", str(pruned)),
        *("--port", str(free_port()), "--control-port", str(free_port()), *more),
    ]


POLICY = """
warmup_seconds = 0
interval_seconds = 1
[[steps]]
weight = 50
min_seconds = 3600
"""
"""A step that no test is long enough to leave."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The fixture model and half of it."""
    root = tmp_path_factory.mktemp("stack")
    request = PruneRequest(
        model=MODEL,
        output=root / "pruned",
        texts=TextOptions(paths=(CALIBRATION,), tokens=2048, length=256),
        # Choosing by trial is the demo's; here a minute matters.
        selection=Selection(keep=0.5, method="block-obs"),
    )
    prune(request, Silent())
    log = (root / "up.log").open("w")
    policy = root / "policy.toml"
    policy.write_text(POLICY)
    process = subprocess.Popen(
        command(
            MODEL, root / "pruned", root / "state", "--model", "fixture", "--policy", str(policy)
        ),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "MOE_SERVE_EXPERT_SELECTIONS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (root / "up.log").read_text()
    yield Running(process=process, info=json.loads(line))
    process.terminate()
    process.wait(90)
    log.close()


MARK = "A sentence that nobody else would write: zanzibar vermilion."


def token(stack: Running) -> dict[str, str]:
    """The header that may write."""
    return {"authorization": f"Bearer {Path(stack.info['token_file']).read_text().strip()}"}


def test_both_variants_answer_the_openai_client(stack: Running) -> None:
    """Models, completions, chat, streams; the pruned model answers as itself."""
    with client(stack.endpoint) as openai:
        assert [m.id for m in openai.models.list()] == ["fixture"]
    for variant in VARIANTS:
        assert len(ask_everything(stack.endpoint, "fixture", variant)) == 4

    def logprobs(variant: str) -> list[float]:
        with client(stack.endpoint, variant) as openai:
            answer = openai.completions.create(
                model="fixture", prompt="def main(", max_tokens=4, temperature=0, logprobs=1
            )
        found = answer.choices[0].logprobs
        assert found is not None
        return [float(x) for x in found.token_logprobs or []]

    assert logprobs(ORIGINAL) != logprobs(PRUNED)


def test_metrics_have_the_contracts_names(stack: Running) -> None:
    """Everything in the catalogue that a machine without a GPU can have, with data."""
    text = httpx.get(stack.info["metrics"], timeout=30).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    elsewhere = {n for n in CATALOGUE if "quality" in n}
    elsewhere |= {"moe_serve_rollout_step", "moe_serve_guard_difference"}
    # Needs more tokens than were asked for so far.
    elsewhere |= {"moe_serve_routing_drift_ratio"}
    for name in {n for n in CATALOGUE if "gpu" not in n} - elsewhere:
        assert name.removesuffix("_total") in families, name
    memory = {
        (s.labels["variant"], s.labels["kind"]): s.value
        for s in families["moe_serve_engine_memory_bytes"].samples
    }
    assert memory[PRUNED, "weights"] < memory[ORIGINAL, "weights"]
    assert memory[PRUNED, "rss"] > 1e8
    tokens = families["moe_serve_tokens"].samples
    assert all(s.value > 0 for s in tokens)
    for variant in VARIANTS:
        url = f"{stack.info['control']}/engines/{variant}/metrics"
        assert "vllm:generation_tokens_total" in httpx.get(url, timeout=10).text


def test_every_panel_has_data(stack: Running, tmp_path: Path) -> None:
    """A real Prometheus on the shipped configuration, both variants busy.

    No query comes back empty but those about GPUs, and the requests it counts are those sent.
    """
    boards = [
        json.loads(file.read_text())
        for file in (Path(__file__).parents[2] / "deploy" / "grafana").glob("*.json")
    ]
    expressions = {
        target["expr"] for board in boards for p in board["panels"] for target in p["targets"]
    }
    # 16 experts need 1,600 selections of 4 a token, so 400 tokens of each variant.
    body = {"model": "fixture", "prompt": "def main(" * 30, "max_tokens": 4}

    def counts(prometheus: str) -> dict[str, float]:
        rows = query(prometheus, 'sum by (variant) (moe_serve_requests_total{outcome="answered"})')
        return {row["metric"]["variant"]: float(row["value"][1]) for row in rows}

    with scraping(stack.info["control"], tmp_path / "prometheus") as prometheus:
        until = time.monotonic() + 60
        while not (before := counts(prometheus)):
            assert time.monotonic() < until
            time.sleep(0.5)
        for variant in VARIANTS * 15:
            url = f"{stack.endpoint}/completions"
            httpx.post(url, json=body, headers={HEADER: variant}, timeout=60).raise_for_status()
        while empty := [e for e in expressions if "gpu" not in e and not query(prometheus, e)]:
            assert time.monotonic() < until, empty
            time.sleep(0.5)
        # Health checks and probes are none of theirs.
        while (after := counts(prometheus)) != {v: before[v] + 15 for v in VARIANTS}:
            assert time.monotonic() < until, (before, after)
            time.sleep(0.5)


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
    answer = httpx.post(url, json={"reason": "seen enough"}, headers=token(stack))
    assert answer.json()["moved"]["effective_seconds"] < 0.5
    assert stack.rollout("status")["state"] == "rolled_back"
    assert "Rolled back" in httpx.get(stack.info["control"]).text
    assert stack.rollout("history", "--verify")["problems"] == []


@pytest.fixture(scope="module")
def later() -> Iterator[ExitStack]:
    """What ends with the module: an engine that later tests ask too."""
    with ExitStack() as stack:
        yield stack


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
    path.write_text(path.read_text().replace("[guards.garbage]\nmargin = 0.7", NO_PROBES))
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


NO_PROBES = "[guards]\nquality = 'off'\ngarbage = 'off'"


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


def test_nothing_of_control_is_reachable_from_the_public_port(stack: Running) -> None:
    """Neither page and API nor the engines' own control paths, whatever one brings along."""
    base = stack.endpoint.removesuffix("/v1")
    ours = ("/", "/login", "/static/page.js", "/metrics", "/api/status", "/api/events")
    for path in (*ours, "/tokenize", "/pause", "/load", "/docs", "/engines/pruned/metrics"):
        assert httpx.get(base + path, headers=token(stack)).status_code == 404
    for path in ("/api/rollback", "/act/rollback", "/login", "/feedback", "/v1/../api/rollback"):
        assert httpx.post(base + path, json={}, headers=token(stack)).status_code == 404


def test_bad_requests_get_the_engines_answer(stack: Running) -> None:
    """Malformed bodies and unknown models are client errors, and harm nobody."""
    url = f"{stack.endpoint}/completions"
    assert httpx.post(url, content=b"{").status_code in (400, 422)
    assert httpx.post(url, json={"model": "other", "prompt": "x"}).status_code == 404
    assert httpx.post(url, json={"model": "fixture", "prompt": "x", "max_tokens": 2}).is_success


def test_rollback_with_the_control_process_killed(stack: Running) -> None:
    """Sixteen streams in flight; the command works alone; nothing fails."""
    stack.rollout("set", "100")
    state = json.loads((Path(stack.info["state"]) / "stack.json").read_text())
    control = [
        p
        for p in psutil.Process(stack.process.pid).children(recursive=True)
        if "moe_serve.rollout.control" in " ".join(p.cmdline())
    ]
    assert control
    with Load(endpoint=stack.endpoint, model="fixture", streams=16, tokens=32) as load:
        load.phase = "before"
        time.sleep(2)
        for process in control:
            process.kill()
        moved = stack.rollout("rollback")
        time.sleep(1)
        load.phase = "after"
        time.sleep(3)
    assert load.failed == 0
    assert load.outcomes["before", PRUNED] >= 16
    assert load.outcomes["after", PRUNED] == 0
    assert load.outcomes["after", ORIGINAL] > 0
    assert moved["effective_seconds"] < 0.1
    assert stack.rollout("history")["changes"][0]["decision"] == "rollback"
    assert state["pid"] == stack.process.pid


def test_sigterm_lets_streams_end(stack: Running) -> None:
    """Last in this module: the stack stops, what was in flight is whole, nothing is left over."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    reasons: list[str | None] = []

    def stream(openai: OpenAI) -> None:
        answer = openai.completions.create(
            model="fixture",
            prompt=MARK,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reasons.append([c.choices[0].finish_reason for c in answer][-1])

    with client(stack.endpoint) as openai:
        threads = [threading.Thread(target=stream, args=(openai,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        stack.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
    assert reasons == ["length"] * 4
    assert stack.process.wait(90) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    # Neither the token nor a prompt is in any log or record; that the files are read is shown by
    # what must be there.
    secret = token(stack)["authorization"].removeprefix("Bearer ").encode()
    state = Path(stack.info["state"])
    files = [f for f in [*state.rglob("*"), state.parent / "up.log"] if f.is_file()]
    text = {f: f.read_bytes() for f in files if f != Path(stack.info["token_file"])}
    assert any(b"seen enough" in found for found in text.values())
    for word in (secret, MARK.encode(), b"zanzibar"):
        assert [f.name for f, found in text.items() if word in found] == []


def test_a_failing_engine_is_named_with_its_log(tmp_path: Path) -> None:
    """A pruned model with a damaged table: which part, and its own words."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in MODEL.iterdir():
        os.link(file, broken / file.name) if file.name != "config.json" else None
    config = json.loads((MODEL / "config.json").read_text())
    config["architectures"] = ["CompactQwen3MoeForCausalLM"]
    config["compact_experts"] = {"version": 1, "layers": {"0": {"width": 1}}}
    (broken / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        command(MODEL, broken, tmp_path / "state"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "error: pruned engine: ended with exit code" in done.stderr
    assert "layer 0: malformed entry" in (tmp_path / "state/logs/pruned.log").read_text()


def test_a_taken_port_is_said_at_once(tmp_path: Path) -> None:
    """Before an engine is started."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command(MODEL, MODEL, tmp_path / "state", "--port", port),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
