"""The streamed reverse pass against whole-model autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_serve.calibration import reverse
from moe_serve.calibration.collect import Collection, collect
from moe_serve.calibration.gradients import GRADIENT_TOKENS, GradientSums, LayerGradients, sketch
from moe_serve.calibration.mixture import read_mixture
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.staging import staged
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from tests.support.models import make_model, write_texts

CPU = torch.device("cpu")


def gradients(
    path: Path, texts: Path, out: Path, batch: int, limit: int = GRADIENT_TOKENS
) -> list[LayerGradients]:
    """Both layers' sums from a calibration run."""
    checkpoint = open_checkpoint(path)
    corpus = load_corpus(checkpoint, TextOptions(paths=(texts,), tokens=300, length=64))
    assert corpus is not None
    record = replace(corpus.record(checkpoint, 0), gradients=limit)
    settings = Collection(device=CPU, batch_tokens=batch)
    with staged(out, {}) as staging:
        found = collect(
            checkpoint, corpus.sequences, record, staging.path, staging, settings, Silent()
        )
        return [found.gradients(i) for i in (0, 1)]


@pytest.mark.parametrize("layer", [0, 1])
def test_gradient_sums_equal_autograd(
    layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metric, attribution and HEAPr's importance from one backward through transformers."""
    # Small chunks of logits: their seams must not lose a token's loss.
    monkeypatch.setattr(reverse, "_LOGITS", 260 * 10)
    path = make_model(tmp_path / "m", "qwen3_moe", experts=4, width=32)
    texts = write_texts(tmp_path / "t.jsonl")
    found = gradients(path, texts, tmp_path / "s", 200)[layer]
    checkpoint = open_checkpoint(path)
    corpus = load_corpus(checkpoint, TextOptions(paths=(texts,), tokens=300, length=64))
    assert corpus is not None
    sequences = corpus.sequences
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    block = model.model.layers[layer].mlp
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["z"], seen["y"] = args[0].flatten(0, 1), output
        output.retain_grad()

    block.register_forward_hook(keep)
    omega_T = sequences.weights()
    metric = torch.zeros(64, 64)
    taylor_N, taylor_NI, fisher_NI = torch.zeros(4), torch.zeros(4, 32), torch.zeros(4, 32)
    maps = torch.zeros(4, 64, 64)
    reached, square, slope = torch.zeros(4), torch.zeros(4, 32), torch.zeros(4, 32)
    position = 0
    for tokens in sequences.tokens:
        ids = torch.from_numpy(tokens)[None]
        logits = model(ids).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
        grad = seen["y"].grad
        assert grad is not None
        for z, g in zip(seen["z"].detach(), grad.flatten(0, 1), strict=True):
            omega = omega_T[position]
            position += 1
            metric += omega * torch.outer(g, g)
            _, weights, chosen = block.gate(z[None])
            for e, w in zip(chosen[0].tolist(), weights[0].detach(), strict=True):
                gate, up = (block.experts.gate_up_proj[e].detach() @ z).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                v = w * (block.experts.down_proj[e].detach().T @ g)
                taylor_N[e] += omega * (h @ v).abs()
                taylor_NI[e] += omega * (h * v).abs()
                fisher_NI[e] += omega * (h * v) ** 2
                maps[e] += omega * w * torch.outer(g, z)
                reached[e] += omega
                square[e] += omega * h**2
                slope[e] += omega * v**2
    close = partial(torch.testing.assert_close, rtol=2e-3, atol=1e-4)
    close(found.metric().float(), metric / omega_T.sum())
    close(found.taylor_N.float(), taylor_N)
    close(found.taylor_NI, taylor_NI)
    close(found.fisher_NI, fisher_NI)
    close(found.map_NRR, maps)  # The hidden size is 64: the sketch is exact.
    heapr = (square / reached[:, None]) * (slope / reached[:, None])
    close(found.heapr().float(), heapr)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_written_out_chain_rule_equals_autograd(family: str, tmp_path: Path) -> None:
    """At the mixture's input: through experts, router (softmax, sigmoid, groups), shared expert."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", family))
    mixture = read_mixture(checkpoint, checkpoint.shape.layers - 1, CPU)
    generator = torch.Generator().manual_seed(0)
    z_TD, g_TD = (torch.randn(40, 64, generator=generator) for _ in range(2))
    z_TD.requires_grad_()
    (expected,) = torch.autograd.grad(mixture(z_TD), z_TD, g_TD)
    shape = checkpoint.shape
    sums = GradientSums(experts=shape.experts, width=shape.width, hidden=shape.hidden)
    found = sums.observe(mixture, z_TD, g_TD, torch.ones(40))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_only_a_share_of_each_domain_takes_part(tmp_path: Path) -> None:
    """A limit keeps whole sequences of every domain; batch size changes nothing."""
    path = make_model(tmp_path / "m", "mixtral")
    texts = write_texts(tmp_path / "t.jsonl")
    small, large = (gradients(path, texts, tmp_path / f"s{b}", b, 200)[0] for b in (64, 1000))
    assert float(small.weight) == pytest.approx(128.0)
    torch.testing.assert_close(small.metric_DD, large.metric_DD, rtol=1e-3, atol=1e-4)
    assert torch.equal(small.reached_N, large.reached_N)


def test_a_sketch_keeps_inner_products() -> None:
    """Maps of 256 dimensions: inner products to a few parts in R = 64 of the norms."""
    torch.manual_seed(0)
    rows = sketch(256)
    assert rows.shape == (64, 256)
    assert torch.equal(rows, sketch(256))
    maps = torch.randn(3, 256, 256)
    maps[1] = maps[0] + 0.5 * maps[1]
    small = (rows @ maps @ rows.T).flatten(1)
    exact = torch.nn.functional.cosine_similarity(maps.flatten(1)[0], maps.flatten(1)[1:])
    found = torch.nn.functional.cosine_similarity(small[0], small[1:])
    torch.testing.assert_close(found, exact, rtol=0, atol=4 / 64)
