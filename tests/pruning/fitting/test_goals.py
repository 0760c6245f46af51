"""What layers are trained towards: the loss, and its gradient, are what they are said to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_serve.calibration.decoder import OutputHead
from moe_serve.calibration.states import States
from moe_serve.pruning.fitting import goals
from moe_serve.pruning.fitting.goals import Piece, PredictionGoal, StreamGoal, rows

HIDDEN, VOCABULARY, TOKENS = 8, 50, 24
PIECES = (Piece(4, 6, held=False), Piece(16, 8, held=True))
POSITIONS = [*range(4, 10), *range(16, 24)]


def written(path: Path, seed: int) -> tuple[States, torch.Tensor]:
    """Random hidden states, in a file and in memory."""
    x_TD = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    states = States(path, HIDDEN)
    states.write(0, x_TD)
    return states, x_TD


def test_rows_are_those_of_the_sequences(tmp_path: Path) -> None:
    """In the order given."""
    states, x_TD = written(tmp_path / "x", 0)
    assert torch.equal(rows(states, PIECES, torch.device("cpu")), x_TD[POSITIONS])


def test_the_stream_s_loss_is_the_squared_distance(tmp_path: Path) -> None:
    """Token by token."""
    target, target_TD = written(tmp_path / "target", 0)
    y_TD = torch.randn(len(POSITIONS), HIDDEN)
    expected_T = (y_TD - target_TD[POSITIONS]).square().sum(dim=1)
    assert torch.allclose(StreamGoal(target=target)(y_TD, PIECES), expected_T)


@pytest.mark.parametrize("logits", [2**25, 3 * VOCABULARY])
def test_the_prediction_s_loss_is_the_divergence(
    logits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own computes it on all logits at once, whatever is in memory at a time."""
    monkeypatch.setattr(goals, "LOGITS", logits)
    final, final_TD = written(tmp_path / "final", 1)
    target, target_TD = written(tmp_path / "target", 2)
    norm = torch.nn.RMSNorm(HIDDEN)
    head = OutputHead(norm=norm, weight_VD=torch.randn(VOCABULARY, HIDDEN))
    y_TD = (target_TD[POSITIONS] + 0.3 * torch.randn(len(POSITIONS), HIDDEN)).requires_grad_()
    goal = PredictionGoal(head=head, final=final, target=target)
    found_T = goal(y_TD, PIECES)

    ours_TD = final_TD[POSITIONS] + y_TD - target_TD[POSITIONS]
    ours_TV, theirs_TV = (
        torch.log_softmax(head(x_TD), dim=-1) for x_TD in (ours_TD, final_TD[POSITIONS])
    )
    expected_TV = torch.nn.functional.kl_div(ours_TV, theirs_TV, log_target=True, reduction="none")
    expected_T = expected_TV.sum(dim=-1)
    assert float(expected_T.detach().min()) > 1e-3
    assert torch.allclose(found_T, expected_T, atol=1e-6)
    (found,) = torch.autograd.grad(found_T.square().sum(), y_TD)
    (expected,) = torch.autograd.grad(expected_T.square().sum(), y_TD)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_original_s_own_output_is_no_loss(tmp_path: Path) -> None:
    """To rounding."""
    final, _ = written(tmp_path / "final", 1)
    target, target_TD = written(tmp_path / "target", 2)
    head = OutputHead(norm=torch.nn.Identity(), weight_VD=torch.randn(VOCABULARY, HIDDEN))
    loss_T = PredictionGoal(head=head, final=final, target=target)(target_TD[POSITIONS], PIECES)
    assert float(loss_T.abs().max()) < 1e-5
