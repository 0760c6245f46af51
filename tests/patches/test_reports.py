"""What an engine says about itself at its own ``/metrics``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors import safe_open

from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready
from moe_serve.serving.ports import free_port
from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.reports import SELECTIONS, Selections, counted_tokens
from moe_serve_vllm.stats import Reports
from tests.support.models import make_model
from tests.support.twins import make_twins, random_table

EXPERTS, TOP_K, WIDTH = 8, 2, 64
PROMPT, GENERATED = 21, 4


def test_every_nth_token_is_counted() -> None:
    """Of three tokens the first and the third: experts 0 and 1 once, 3 twice."""
    counter = Selections(4, every=2)
    counter(torch.tensor([[0, 1], [1, 2], [3, 3]], dtype=torch.int32))
    assert counter.counts.tolist() == [1, 1, 0, 2]


def test_the_rate_is_a_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else is refused by the variable's name; without it nothing is counted."""
    assert counted_tokens() == 0
    monkeypatch.setenv(SELECTIONS, "16")
    assert counted_tokens() == 16
    monkeypatch.setenv(SELECTIONS, "often")
    with pytest.raises(UnsupportedSettings, match=SELECTIONS):
        counted_tokens()


def test_ranks_add_up(tmp_path: Path) -> None:
    """Bytes are sums, 100 + 50; both ranks see every token, so selections are not: 7, not 14."""
    for rank, size in enumerate((100, 50)):
        report = {"memory": {"weights": size}, "selections": {"1": [7, 0]}}
        (tmp_path / f"{rank}.json").write_text(json.dumps(report))
    settings: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["CompactX"]), served_model_name="m"
        ),
        cache_config=SimpleNamespace(num_gpu_blocks=3, block_size=16),
    )
    found = {
        (s.name, *s.labels.values()): s.value
        for family in Reports(tmp_path, settings).collect()
        for s in family.samples
    }
    assert found == {
        ("moe_serve_engine_memory_bytes", "pruned", "m", "weights"): 150,
        ("moe_serve_kv_cache_capacity_tokens", "pruned", "m"): 48,
        ("moe_serve_expert_selections_total", "pruned", "m", "1", "0"): 7,
        ("moe_serve_expert_selections_total", "pruned", "m", "1", "1"): 0,
    }


def ours(url: str) -> dict[str, list[Any]]:
    """Samples of our families by name."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return {
        family.name: family.samples
        for family in text_string_to_metric_families(text)
        if family.name.startswith("moe_serve_")
    }


def test_an_engine_tells_memory_and_selections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine, one request of 21 + 4 tokens.

    The last token is not fed back: 24 tokens select 2 experts each in both layers, so each layer
    counts 48, and nothing of the start-up.
    """
    source = make_model(tmp_path / "source", "qwen3_moe", experts=EXPERTS, width=WIDTH)
    table = random_table(0, "blocks", experts=EXPERTS, width=WIDTH, top_k=TOP_K)
    model = tmp_path / "compact"
    make_twins(source, model, tmp_path / "tied", {0: table})
    monkeypatch.setenv(SELECTIONS, "1")
    spec = EngineSpec(
        variant="pruned",
        model=model,
        served_model="tiny",
        port=free_port(),
        log=tmp_path / "log",
        arguments=("--max-model-len", "128", "--dtype", "float32"),
    )
    engine = spec.launch(gpu=has_gpu(), yielding=False)
    try:
        while not is_ready(spec, engine):
            time.sleep(0.2)
        body = {"model": "tiny", "prompt": list(range(1, PROMPT + 1)), "max_tokens": GENERATED}
        reply = httpx.post(
            f"{spec.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60
        )
        reply.raise_for_status()
        until = time.monotonic() + 60
        total: dict[str, float] = {}
        while not any(total.values()) and time.monotonic() < until:
            time.sleep(0.2)
            found = ours(spec.url)
            total = dict.fromkeys(("0", "1"), 0.0)
            for sample in found.get("moe_serve_expert_selections", []):
                total[sample.labels["layer"]] += sample.value
    finally:
        engine.stop(10)
    expected = float((PROMPT + GENERATED - 1) * TOP_K)
    assert total == {"0": expected, "1": expected}
    memory = {s.labels["kind"]: s for s in found["moe_serve_engine_memory_bytes"]}
    assert memory["weights"].labels == {"variant": "pruned", "model": "tiny", "kind": "weights"}
    with safe_open(model / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    # vLLM stores the rows of 260 tokens, in and out, as 320.
    assert memory["weights"].value == stored + 2 * (320 - 260) * 64 * 4
    # Two layers of one head of 32 numbers, keys and values, FP32: 512 bytes a token.
    (capacity,) = found["moe_serve_kv_cache_capacity_tokens"]
    assert memory["kv_cache"].value == capacity.value * 512
