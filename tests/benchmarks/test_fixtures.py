"""What trains the models that figures are made on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from benchmarks.fixtures import MODEL
from benchmarks.fixtures.model import ARCHITECTURES, save, untrained
from benchmarks.fixtures.train import Schedule, _balance, _nudge, train
from moe_serve.checkpoint.source import open_checkpoint


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_architecture_trains_and_is_read(kind: str, tmp_path: Path) -> None:
    """Three steps on a text that repeats itself: the loss falls, and the checkpoint is read."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[kind]
    model = untrained(architecture)
    losses: list[float] = []
    schedule = Schedule(tokens=3 * 128, batch=2, length=64, warm_up=0.0)
    ids = np.tile(np.arange(5, 25, dtype=np.int64), 20)
    train(
        model,
        ids,
        schedule,
        lambda _step, loss, _rate: losses.append(loss),
        sigmoid=architecture.sigmoid,
    )
    assert len(losses) == 2  # The first step and the last.
    assert losses[1] < losses[0]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    save(model, tokenizer, tmp_path / "m", architecture.experts_key)
    checkpoint = open_checkpoint(tmp_path / "m")
    biases = [n for n in checkpoint.tensors if n.endswith("e_score_correction_bias")]
    assert bool(biases) is architecture.sigmoid
    for name in biases:
        bias = checkpoint.read(name)
        assert bias.dtype == torch.float32
        assert bool(bias.any())
    shape = checkpoint.shape
    assert (shape.experts, shape.top_k) == ((24, 4) if architecture.sigmoid else (16, 4))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_a_router_that_favours_nobody_is_balanced(*, sigmoid: bool) -> None:
    """Equal scores and loads: 1, the least; all of both at one expert of four: more."""
    even = (torch.zeros(4, 4), torch.arange(4)[:, None])
    assert float(_balance([even], sigmoid=sigmoid)) == pytest.approx(1.0)
    greedy = (torch.tensor([[9.0, -9.0, -9.0, -9.0]] * 4), torch.zeros(4, 1, dtype=torch.int64))
    assert float(_balance([even, greedy], sigmoid=sigmoid)) == pytest.approx(2.5, rel=0.01)


def test_a_selection_bias_moves_towards_the_idle() -> None:
    """Up for who gets less than the mean, down for who gets more; other routers have none."""
    router = nn.Linear(2, 3)
    _nudge(router, torch.tensor([0.5, 0.2, 0.3]), 0.1)
    router.e_score_correction_bias = torch.zeros(3)
    _nudge(router, torch.tensor([0.5, 0.2, 0.3]), 0.1)
    moved = torch.as_tensor(router.e_score_correction_bias)
    assert torch.allclose(moved, torch.tensor([-0.1, 0.1, 0.1]))
