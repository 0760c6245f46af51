"""Two real engines, the real Envoy and control process, real clients."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fixtures import HELDOUT, MODEL
from benchmarks.tasks.build import HERE as PACK
from moe_serve.demo.clients import ask_everything, client
from moe_serve.evaluation.bench import speed
from moe_serve.evaluation.load import Load as SpeedLoad
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.metrics.catalogue import CATALOGUE
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED, VARIANTS
from tests.support.prometheus import query, scraping
from tests.support.running import Running


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


def test_comparing_engines_with_tasks_and_speed(stack: Running, tmp_path: Path) -> None:
    """Two URLs; then a directory and the URL of the same model, between which little differs."""
    texts = tmp_path / "texts.jsonl"
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["domain"] == "python"]
    texts.write_text("\n".join(map(json.dumps, chosen)))
    both = Wanted(
        original=stack.engines[ORIGINAL],
        pruned=stack.engines[PRUNED],
        texts=TextOptions(paths=(texts,), tokens=64, length=32),
        tasks=(str(PACK / "cloze.yaml"),),
        task_limit=2,
        load=SpeedLoad(requests=2, prompt_tokens=16, answer_tokens=4, concurrency=2),
        results=(tmp_path / "a.json", tmp_path / "b.json"),
    )
    found = measure(both, SILENT)
    assert found.mean.kl_nats > 0.001
    assert found.tasks["tasks"][0]["items"] == 2
    assert found.speed["completed"] == {"original": 2, "pruned": 2}
    # An engine whose checkpoint is not ours doesn't say what its weights take.
    assert found.held["engine_weight_bytes"]["pruned"] > 1e6
    assert min(found.held["kv_cache_capacity_tokens"][variant] for variant in VARIANTS) > 0
    assert speed(*both.results or ()) == found.speed | {"tool": "vllm bench serve"}
    mixed = measure(
        replace(both, original=str(MODEL), pruned=both.original, load=None, results=None), SILENT
    )
    # One rounds to BF16 where the other does not.
    assert mixed.mean.kl_nats < found.mean.kl_nats / 4
    assert mixed.mean.perplexity_ratio == pytest.approx(1.0, abs=0.02)
    assert mixed.tasks["tasks"][0]["items"] == 2


def test_nothing_of_control_is_reachable_from_the_public_port(stack: Running) -> None:
    """Neither page and API nor the engines' own control paths, whatever one brings along."""
    base = stack.endpoint.removesuffix("/v1")
    ours = ("/", "/login", "/static/page.js", "/metrics", "/api/status", "/api/events")
    for path in (*ours, "/tokenize", "/pause", "/load", "/docs", "/engines/pruned/metrics"):
        assert httpx.get(base + path, headers=stack.token).status_code == 404
    for path in ("/api/rollback", "/act/rollback", "/login", "/feedback", "/v1/../api/rollback"):
        assert httpx.post(base + path, json={}, headers=stack.token).status_code == 404


def test_bad_requests_get_the_engines_answer(stack: Running) -> None:
    """Malformed bodies and unknown models are client errors, and harm nobody."""
    url = f"{stack.endpoint}/completions"
    assert httpx.post(url, content=b"{").status_code in (400, 422)
    assert httpx.post(url, json={"model": "other", "prompt": "x"}).status_code == 404
    assert httpx.post(url, json={"model": "fixture", "prompt": "x", "max_tokens": 2}).is_success
