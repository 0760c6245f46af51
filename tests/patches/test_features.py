"""What vLLM's users switch on works on a compact model: one engine, asked in several ways."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.patches.test_oracle import BOUND
from tests.support.references import reference_logprobs
from tests.support.session import Ask, Told, ask_one
from tests.support.twins import make_twins, random_table

FIXTURE = Path(__file__).parents[2] / "benchmarks/fixtures/qwen3moe-7m"
BATCH = 32
"""Tokens that the engine computes at a time."""
RANK, ALPHA = 4, 8


def prompts() -> list[list[int]]:
    """One of three batches' length, one of less than a batch."""
    rng = random.Random(3)
    return [[rng.randrange(1, 4096) for _ in range(n)] for n in (90, 12)]


def apart(told: list[Told], reference: list[list[float]]) -> float:
    """Largest difference over the prompts."""
    assert [len(t.prompt) for t in told] == [len(row) for row in reference]
    pairs = [
        p for t, row in zip(told, reference, strict=True) for p in zip(t.prompt, row, strict=True)
    ]
    return max(abs(a - b) for a, b in pairs)


def adapted(tied: Path, adapter: Path, merged: Path) -> None:
    """An adapter for attention in PEFT's files, and a copy of the twin with it added in.

    W becomes W + ALPHA / RANK · B · A.
    """
    shutil.copytree(tied, merged)
    weights = load_file(tied / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name in [n for n in weights if n.endswith(("q_proj.weight", "v_proj.weight"))]:
        weight = weights[name].float()
        down = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], RANK, generator=generator)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weight + ALPHA / RANK * up @ down
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    settings["target_modules"] = ["q_proj", "v_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def test_features_of_the_engine_on_a_compact_model(tmp_path: Path) -> None:
    """Chunked prefill, prompt log-probabilities, prefix caching, a grammar, an adapter.

    The prompt of 90 tokens takes three batches of 32, and all its log-probabilities are the
    twin's. Asked a second time, two of its blocks of 32 are there already and the answer is the
    same. A regular expression holds. With an adapter on the attention the twin's own weights are
    what the adapter comes to when it is added in; without it the answers are the first ones again.
    """
    tables = {i: random_table(i, "mixed", experts=16, width=192, top_k=4) for i in range(4)}
    dropped = make_twins(FIXTURE, tmp_path / "compact", tmp_path / "tied", tables)
    adapted(tmp_path / "tied", tmp_path / "adapter", tmp_path / "merged")
    scored = {"prompt_logprobs": 0, "max_tokens": 8, "ignore_eos": True}
    long = {"max_tokens": 8, "ignore_eos": True}
    adapter = str(tmp_path / "adapter")
    plain, first, again, bound, other, back = ask_one(
        tmp_path / "compact",
        [
            Ask(prompts=prompts(), sampling=scored),
            Ask(prompts=prompts()[:1], sampling=long),
            Ask(prompts=prompts()[:1], sampling=long),
            Ask(prompts=prompts(), sampling={"max_tokens": 12}, regex="[0-9]{3}"),
            Ask(prompts=prompts(), sampling=scored, adapter=adapter),
            Ask(prompts=prompts(), sampling=scored),
        ],
        max_num_batched_tokens=BATCH,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
        enable_lora=True,
        max_lora_rank=8,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    reference = reference_logprobs(tmp_path / "tied", prompts(), dropped)
    with_adapter = reference_logprobs(tmp_path / "merged", prompts(), dropped)
    assert apart(plain, reference) <= BOUND
    assert again[0].cached >= 64
    assert first[0].tokens == again[0].tokens == plain[0].tokens
    assert again[0].generated == pytest.approx(plain[0].generated, abs=BOUND)
    assert all(re.fullmatch("[0-9]{3}", told.text) for told in bound), bound
    assert apart(other, with_adapter) <= BOUND
    assert apart(other, reference) > 100 * BOUND
    assert apart(back, reference) <= BOUND
