"""The exporter over real HTTP: names, labels, and absence instead of zero."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.metrics.catalogue import CATALOGUE
from moe_serve.metrics.drift import Drift
from moe_serve.metrics.exporter import Exporter, Recorded, Watched
from moe_serve.metrics.memory import GpuReading
from moe_serve.metrics.sources import Endpoints, Host, Source
from moe_serve.serving.ports import free_port

ENGINE = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 30
vllm:generation_tokens_total{engine="1",model_name="m"} 12
# TYPE moe_serve_expert_selections_total counter
moe_serve_expert_selections_total{layer="0",expert="0"} 150
moe_serve_expert_selections_total{layer="0",expert="1"} 50
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{le="+Inf"} 5
vllm:inter_token_latency_seconds_sum 1
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="+Inf"} 5
vllm:e2e_request_latency_seconds_sum 1
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 2
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 5
vllm:time_to_first_token_seconds_count{model_name="m"} 5
vllm:time_to_first_token_seconds_sum{model_name="m"} 1.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1
"""

RECORDED = Recorded(
    share=0.25,
    state="canary",
    decisions={("set", "by hand"): 3},
    quality={"japanese": (5, 0.25, 0.75)},
)


@pytest.fixture
def engine() -> Iterator[str]:
    """An address that serves an engine's metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(ENGINE.encode())

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()


def samples(exporter: Exporter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Scrape through the text format, as Prometheus does."""
    registry = CollectorRegistry()
    registry.register(exporter)
    text = generate_latest(registry).decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def exporter(engine: str, pid: int) -> Exporter:
    """One engine that answers, one that doesn't; no proxy."""
    dead = f"http://127.0.0.1:{free_port()}/metrics"
    return Exporter(
        model="m",
        engines=[
            Watched(
                variant=name,
                pid=pid,
                weight_bytes=7,
                kv_bytes_per_token=8,
                source=Source(name=name, url=url),
            )
            for name, url in (("original", engine), ("pruned", dead))
        ],
        proxy=Endpoints(name="envoy", url=dead),
        recorded=lambda: RECORDED,
        votes=lambda: {("pruned", "bad"): 2.0},
    )


def test_what_an_engine_says_appears_under_our_names(engine: str) -> None:
    """Counters are summed over an engine's ranks; buckets stay exact."""
    found = samples(exporter(engine, os.getpid()))
    who = (("model", "m"), ("variant", "original"))
    assert found["moe_serve_tokens_total", (("kind", "generation"), *who)] == 42
    bucket = "moe_serve_time_to_first_token_seconds_bucket"
    assert found[bucket, (("le", "0.1"), *who)] == 2
    assert found[bucket, (("le", "+Inf"), *who)] == 5
    assert found["moe_serve_kv_cache_capacity_tokens", who] == 1600
    assert found["moe_serve_engine_memory_bytes", (("kind", "kv_cache"), *who)] == 12800
    assert found["moe_serve_traffic_weight_ratio", who] == 0.75
    assert found["moe_serve_rollout_state", (("state", "canary"),)] == 1
    assert {name for name, _ in found if name.startswith("moe_serve")}


def test_quality_and_votes_appear_by_domain_and_variant(engine: str) -> None:
    """As probes and people gave them; of the texts nothing but their domain."""
    found = samples(exporter(engine, os.getpid()))
    domain = (("domain", "japanese"),)
    assert found["moe_serve_quality_kl_nats", domain] == 0.25
    assert found["moe_serve_quality_top1_agreement_ratio", domain] == 0.75
    assert found["moe_serve_quality_probes", domain] == 5
    assert found["moe_serve_feedback_total", (("variant", "pruned"), ("verdict", "bad"))] == 2


def test_everything_documented_is_exported_and_nothing_else(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue, which the reference page is written from, and a page with all there can be."""
    gpu = GpuReading(index="0", uuid="u", total=9, used_by_process={os.getpid(): 1})
    monkeypatch.setattr("moe_serve.metrics.exporter.read_gpus", lambda: [gpu])
    whole = exporter(engine, os.getpid())
    whole.engines[0] = replace(whole.engines[0], drift=Drift({"0": (1.0, 1.0)}))
    whole.recorded = lambda: replace(RECORDED, guards=(1, {("errors", "lower"): 0.0}))
    whole.expert_bytes = {("0", "kept"): 1}
    whole.proxy = Proxy()
    found = {family.name: family for family in whole.collect()}
    assert {name.removesuffix("_total") for name in CATALOGUE} == set(found)
    for name, metric in CATALOGUE.items():
        labels = set(metric.labels) | ({"le"} if metric.kind == "histogram" else set())
        for sample in found[name.removesuffix("_total")].samples:
            assert set(sample.labels) - {"le"} == labels - {"le"}, sample


def test_what_the_plugin_exports_is_documented() -> None:
    """Every family that it makes has a row, with its labels, on the reference page."""
    text = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    # By its path: to import it is to import vLLM.
    package = find_spec("moe_serve_vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "stats.py").read_text()
    names = re.findall(r'MetricFamily\(\s+"(\w+)"', source)
    assert len(names) == 3
    for name in names:
        assert re.search(rf"^\| `{name}` \| \w+ \| `variant`, `model`", text, re.MULTILINE), name


class Proxy:
    """Knows one variant's outcomes."""

    name, age = "envoy", 1.0

    def read(self) -> dict[str, Host]:
        """Ten answered."""
        return {"original": Host(answered=10, failed=0, cut=0, abandoned=0, sent=10, healthy=True)}


def test_a_silent_engine_is_absent_not_zero(engine: str) -> None:
    """No token count and no outcome for it, but an age that grows."""
    found = samples(exporter(engine, os.getpid()))
    pruned = {name for name, labels in found if ("variant", "pruned") in labels}
    assert "moe_serve_tokens_total" not in pruned
    assert "moe_serve_requests_total" not in pruned
    assert found["moe_serve_input_age_seconds", (("source", "pruned"),)] >= 0


def test_a_dead_process_has_no_memory(engine: str) -> None:
    """Resident memory disappears with the process."""
    gone = 2**22 - 1
    found = samples(exporter(engine, gone))
    assert not [labels for name, labels in found if ("kind", "rss") in labels]


def test_engines_that_hang_do_not_add_up(engine: str) -> None:
    """Both accept a connection and say nothing: a scrape waits for them at once, 2 s each."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/metrics"
        whole = exporter(engine, os.getpid())
        whole.engines = [replace(e, source=Source(name=e.variant, url=url)) for e in whole.engines]
        whole.proxy = Endpoints(name="envoy", url=url)
        began = time.monotonic()
        list(whole.collect())
        # One after the other the three would take six.
        assert 1.9 < time.monotonic() - began < 5.5


def test_the_processes_of_an_engine_are_looked_up_now_and_then(engine: str) -> None:
    """A child that is started is found when half a minute has passed; one that is gone never."""
    now = [0.0]
    whole = exporter(engine, os.getpid())
    whole.clock = lambda: now[0]
    before = whole._tree(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        assert whole._tree(os.getpid()) == before
        now[0] = 31.0
        assert child.pid in whole._tree(os.getpid())
        child.kill()
    assert whole._tree(2**22 - 1) == []


def test_the_catalogue_follows_the_rules() -> None:
    """Our prefix, base units, and ``_total`` on counters only."""
    for name, metric in CATALOGUE.items():
        assert name.startswith("moe_serve_")
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
