"""Ridge re-fit against a dense solution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.calibration.mixture import Mixture, Router, Unit
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.quantisation.plain import Plain
from moe_serve.families import Routing
from moe_serve.pruning.fitting import refit as module
from moe_serve.pruning.fitting.refit import FitTokens, refit, side_of
from moe_serve.pruning.fitting.routed import Routed
from moe_serve.pruning.plan import Refit

TOKENS, HIDDEN, EXPERTS, WIDTH = 400, 12, 4, 6


def problem(tmp_path: Path) -> tuple[Mixture, torch.Tensor, torch.Tensor, FitTokens]:
    """A small mixture, its inputs, a target and the tokens."""
    torch.manual_seed(0)
    units = tuple(
        Unit(
            owners=(e,),
            gate_FD=torch.randn(WIDTH, HIDDEN),
            up_FD=torch.randn(WIDTH, HIDDEN),
            down_DF=torch.randn(HIDDEN, WIDTH),
        )
        for e in range(EXPERTS)
    )
    router = Router(weight_ND=torch.randn(EXPERTS, HIDDEN), rule=Routing(top_k=2, renormalise=True))
    mixture = Mixture(router=router, units=units, activation=torch.nn.functional.silu)
    z = torch.randn(TOKENS, HIDDEN)
    target = torch.randn(TOKENS, HIDDEN)
    batches = tuple(
        Batch(
            sequences=(i,),
            shape=(1, 50),
            tokens=slice(50 * i, 50 * i + 50),
            device=torch.device("cpu"),
        )
        for i in range(TOKENS // 50)
    )
    held = torch.zeros(TOKENS, dtype=torch.bool)
    held[350:] = True
    tokens = FitTokens(batches=batches, omega_T=torch.rand(TOKENS) + 0.5, held_T=held)
    States(tmp_path / "z", HIDDEN).write(0, z)
    States(tmp_path / "e", HIDDEN).write(0, target - mixture(z))
    return mixture, z, target, tokens


def dense(mixture: Mixture, z: torch.Tensor) -> torch.Tensor:
    """P [T, F] by a plain loop over tokens and experts."""
    weights = mixture.router(z)
    columns = [weights[:, [e]] * mixture.hidden(unit, z) for e, unit in enumerate(mixture.units)]
    return torch.cat(columns, dim=1).double()


def run(tmp_path: Path, settings: Refit) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(fitted, dense solution, residual mismatch)."""
    mixture, z, target, tokens = problem(tmp_path)
    inputs, residual = States(tmp_path / "z", HIDDEN), States(tmp_path / "e", HIDDEN)
    routed = Routed(mixture, inputs, tokens.batches, side=side_of(settings, 2))
    fitted = refit(routed, residual, tokens, settings, Plain(dtype="F32"))
    found = torch.cat([u.down_DF for u in fitted.units], dim=1).T.double()
    p = dense(mixture, z)
    start = torch.cat([u.down_DF for u in mixture.units], dim=1).T.double()
    omega = tokens.omega_T.double()[:, None]
    normal = p.T @ (omega * p)
    ridge = fitted.ridge * normal.diagonal().diag()
    expected = torch.linalg.solve(normal + ridge, p.T @ (omega * target.double()) + ridge @ start)
    left = States(tmp_path / "e", HIDDEN).read(0, TOKENS)
    off = float((left - (target.double() - p @ found)).abs().max())
    assert fitted.error_after < fitted.error_before
    return found, expected, off


def test_joint_refit_is_the_ridge_solution(tmp_path: Path) -> None:
    """One group: equal to solving the dense system; the residual left is the true one."""
    found, expected, off = run(tmp_path, Refit(ridges=(0.1,)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert off < 1e-4


def test_the_fit_is_the_same_whatever_a_neuron_s_scale(tmp_path: Path) -> None:
    """A neuron scaled up and its column down by as much: the same function, the same fit."""
    mixture, z, target, tokens = problem(tmp_path)
    scale = torch.tensor([1.0, 4.0, 0.25, 16.0, 1.0, 1.0])
    scaled = replace(
        mixture,
        units=tuple(
            replace(u, up_FD=u.up_FD * scale[:, None], down_DF=u.down_DF / scale)
            for u in mixture.units
        ),
    )
    outputs = []
    for layer in (mixture, scaled):
        States(tmp_path / "e", HIDDEN).write(0, target - layer(z))
        routed = Routed(layer, States(tmp_path / "z", HIDDEN), tokens.batches)
        residual = States(tmp_path / "e", HIDDEN)
        refit(routed, residual, tokens, Refit(ridges=(0.1,)), Plain(dtype="F32"))
        outputs.append(residual.read(0, TOKENS))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_a_neuron_that_no_token_used_stays(tmp_path: Path) -> None:
    """Its column, bit for bit up to the solver's rounding."""
    mixture, z, target, tokens = problem(tmp_path)
    first = mixture.units[0]
    dead = replace(first, up_FD=first.up_FD * torch.tensor([1.0, 1, 1, 0, 1, 1])[:, None])
    layer = replace(mixture, units=(dead, *mixture.units[1:]))
    States(tmp_path / "e", HIDDEN).write(0, target - layer(z))
    routed = Routed(layer, States(tmp_path / "z", HIDDEN), tokens.batches)
    fitted = refit(
        routed, States(tmp_path / "e", HIDDEN), tokens, Refit(ridges=(0.1,)), Plain(dtype="F32")
    )
    found_DF = fitted.units[0].down_DF
    torch.testing.assert_close(found_DF[:, 3], first.down_DF[:, 3], rtol=1e-6, atol=1e-6)
    assert float((found_DF[:, 2] - first.down_DF[:, 2]).norm()) > 0.01


def test_block_descent_reaches_the_joint_solution(tmp_path: Path) -> None:
    """Groups solved in turn converge to what one system gives; units wider than a group split."""
    found, _, off = run(tmp_path, Refit(ridges=(0.1,), side=4, sweeps=200))
    joint, _, _ = run(tmp_path, Refit(ridges=(0.1,)))
    assert float((found - joint).norm() / joint.norm()) < 1e-3
    assert off < 1e-3


def test_only_the_first_group_holds_tokens_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To choose λ; all groups are fitted to all tokens, which one system of all shows."""
    known, held = module._accumulate, []

    def watched(*arguments: Any) -> Any:
        normals = known(*arguments)
        held.append(normals[1] is not None)
        return normals

    monkeypatch.setattr(module, "_accumulate", watched)
    found, joint, off = run(tmp_path, Refit(ridges=(0.01, 0.1, 10.0), side=4, sweeps=200))
    assert held[0]
    assert not any(held[1:])
    assert float((found - joint).norm() / joint.norm()) < 1e-3
    assert off < 1e-3
