"""The streamed forward pass against transformers, and the statistics against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_serve.calibration.collect import Collection, collect
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.staging import staged
from moe_serve.evaluation.divergence import divergence
from moe_serve.evaluation.quality import by_domain
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from tests.support.models import make_model, write_texts

CPU = torch.device("cpu")


def statistics(path: Path, texts: Path, out: Path, batch: int) -> list[LayerStatistics]:
    """Collect on a model."""
    checkpoint = open_checkpoint(path)
    corpus = load_corpus(checkpoint, TextOptions(paths=(texts,), tokens=600, length=64))
    assert corpus is not None
    with staged(out, {}) as staging:
        found = collect(
            checkpoint,
            corpus.sequences,
            corpus.record(checkpoint, 0),
            staging.path,
            staging,
            Collection(device=CPU, batch_tokens=batch),
            Silent(),
        )
        return [found.layer(i) for i in (0, 1)]


@torch.inference_mode()
def test_statistics_equal_plain_loops(tmp_path: Path) -> None:
    """Counts, REAP sums, outputs and normal matrices of layer 0, token by token."""
    path = make_model(tmp_path / "m", "qwen3_moe", experts=4, width=32)
    texts = write_texts(tmp_path / "t.jsonl")
    found = statistics(path, texts, tmp_path / "s", 256)[0]
    checkpoint = open_checkpoint(path)
    corpus = load_corpus(checkpoint, TextOptions(paths=(texts,), tokens=600, length=64))
    assert corpus is not None
    sequences = corpus.sequences
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    count = torch.zeros(len(sequences.domains), 4)
    weighted = torch.zeros_like(count)
    normal = torch.zeros(4, 32, 32)
    omega = sequences.weights()
    position = 0
    for tokens, domain in zip(sequences.tokens, sequences.domain, strict=True):
        seen.clear()
        model(torch.from_numpy(tokens)[None])
        for z in seen[0]:
            _, weights, chosen = block.gate(z[None])
            for expert, g in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ z).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                f = block.experts.down_proj[expert] @ h
                count[domain, expert] += 1
                weighted[domain, expert] += g * f.norm()
                normal[expert] += omega[position] * g * g * torch.outer(h, h)
            position += 1
    torch.testing.assert_close(found.count_CN.float(), count)
    torch.testing.assert_close(found.weighted_norm_CN.float(), weighted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.normal_NII, normal, rtol=1e-3, atol=1e-3)
    reap = weighted.sum(0) / count.sum(0).clamp(min=1)
    torch.testing.assert_close(found.reap().float(), reap, rtol=1e-4, atol=1e-4)


def test_batch_size_does_not_change_statistics(tmp_path: Path) -> None:
    """Counts and reservoir exactly; sums to 1e-5."""
    path = make_model(tmp_path / "m", "mixtral")
    texts = write_texts(tmp_path / "t.jsonl")
    small, large = (statistics(path, texts, tmp_path / f"s{b}", b) for b in (64, 1000))
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a.count_CN, b.count_CN)
        torch.testing.assert_close(a.reservoir_SD, b.reservoir_SD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.normal_NII, b.normal_NII, rtol=1e-4, atol=1e-3)


def test_divergence_equals_plain_transformers(tmp_path: Path) -> None:
    """Streamed KL, agreement and perplexity against whole-model logits; zero with itself."""
    a = make_model(tmp_path / "a", "qwen3_moe", seed=1)
    b = make_model(tmp_path / "b", "qwen3_moe", seed=1, num_experts_per_tok=3)
    texts = write_texts(tmp_path / "t.jsonl")
    first, second = open_checkpoint(a), open_checkpoint(b)
    corpus = load_corpus(first, TextOptions(paths=(texts,), tokens=300, length=64))
    assert corpus is not None
    args = (corpus.sequences, tmp_path, CPU, 128, Silent())
    values = divergence(first, second, *args)
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (a, b)]
    for tokens, values_T4 in zip(corpus.sequences.tokens, values, strict=True):
        ids = torch.from_numpy(tokens)[None]
        with torch.inference_mode():
            p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in models)
        kl, _, _, loss_pruned = values_T4.sum(axis=0)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-4)
        assert len(values_T4) == len(tokens) - 1
        loss = -q[torch.arange(len(q)), ids[0, 1:]].sum()
        assert loss_pruned == pytest.approx(float(loss), rel=1e-5)
    kept = tmp_path / "kept.f32"
    again = [divergence(first, second, *args, reference=kept) for _ in "ab"]
    for one in again:
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(values))
    assert kept.exists()
    assert not (tmp_path / "reference.f32").exists()
    same = by_domain(corpus.sequences, divergence(first, first, *args))
    assert all(d.figures.kl_nats == 0 and d.figures.top1_agreement == 1 for d in same.values())
