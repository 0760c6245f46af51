"""Removal paths against brute force."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import pytest
import torch

from moe_serve.pruning.methods import obs
from moe_serve.pruning.methods.obs import damped_inverse, peel, peel_products, removal_path


def added_error(p: torch.Tensor, w: torch.Tensor, kept: list[int], ridge: float) -> float:
    """Squared error of the best re-fit on ``kept``, ridge as in the path, by least squares.

    With H = PᵀP + λI the objective is tr((W' - W)ᵀ H (W' - W)); fixing rows outside ``kept`` to
    zero, the minimum over the others is a linear system.
    """
    h = p.T @ p + ridge * torch.eye(p.shape[1], dtype=p.dtype)
    full = torch.zeros_like(w)
    full[kept] = torch.linalg.solve(h[kept][:, kept], (h @ w)[kept])
    change = full - w
    return float((change * (h @ change)).sum())


def test_error_is_that_of_the_best_refit() -> None:
    """The path's error equals least squares on the neurons it keeps, at every length."""
    torch.manual_seed(0)
    p = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    down = torch.randn(5, 12, dtype=torch.float64)
    path = removal_path((p.T @ p).float()[None], down.float()[None], ridge=0.01)
    ridge = 0.01 * float((p.T @ p).diagonal().mean())
    for count in range(12):
        kept = sorted(path.kept(0, count))
        expected = added_error(p, down.T, kept, ridge)
        assert float(path.error_at(count)[0]) == pytest.approx(expected, rel=1e-4)


def test_the_first_neuron_to_go_is_the_cheapest() -> None:
    """One removal is optimal over all neurons, by enumeration."""
    torch.manual_seed(1)
    p = torch.randn(100, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    down = torch.randn(3, 8, dtype=torch.float64)
    path = removal_path((p.T @ p).float()[None], down.float()[None], ridge=0.01)
    ridge = 0.01 * float((p.T @ p).diagonal().mean())
    every = list(range(8))
    costs = {j: added_error(p, down.T, [i for i in every if i != j], ridge) for j in every}
    assert int(path.order_NI[0, 0]) == min(costs, key=lambda j: costs[j])


def test_dead_and_duplicate_neurons_go_first() -> None:
    """A neuron that never fires and one of two equal ones cost nothing."""
    torch.manual_seed(2)
    p = torch.randn(300, 10)
    p[:, 4] = 0.0
    p[:, 7] = p[:, 2]
    path = removal_path((p.T @ p)[None], torch.randn(1, 6, 10), ridge=1e-6)
    first = set(path.order_NI[0, :2].tolist())
    assert first in ({4, 7}, {4, 2})
    assert float(path.error_NI[0, 1]) < 1e-3 * float(path.error_NI[0, 2])


def test_an_expert_no_token_reached_is_free() -> None:
    """0/0 does not arise: all its neurons cost next to nothing."""
    torch.manual_seed(3)
    p = torch.randn(100, 6)
    normal = torch.stack([p.T @ p, torch.zeros(6, 6)])
    path = removal_path(normal, torch.randn(2, 4, 6))
    assert torch.isfinite(path.error_NI).all()
    assert path.error_NI[1, -1] < 0.05 * path.error_NI[0, -1]


def test_every_neuron_goes_once_in_rounds_too() -> None:
    """Wide experts lose several neurons a round; the order stays a permutation."""
    torch.manual_seed(4)
    width = 500
    p = torch.randn(600, width)
    path = removal_path((p.T @ p)[None], torch.randn(1, 8, width))
    assert sorted(path.order_NI[0].tolist()) == list(range(width))
    assert bool((path.error_NI[0].diff() >= -1e-6).all())
    # Three a round; within one the error grows evenly, and exactly so.
    first, second, third = path.error_NI[0, :3].tolist()
    assert (first, second) == pytest.approx((third / 3, third * 2 / 3), rel=1e-14)


@pytest.mark.parametrize(("hidden", "each"), [(3, 12 * (12 + 3) * 8), (20, 12 * (24 + 20) * 8)])
def test_experts_that_do_not_fit_together_go_in_turn(
    hidden: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five, two at a time, by weights or by their products: the same as all at once."""
    torch.manual_seed(6)
    p = torch.randn(5, 40, 12)
    normal, down = p.transpose(1, 2) @ p, torch.randn(5, hidden, 12)
    whole = removal_path(normal, down)
    peeled = [Mock(wraps=peel), Mock(wraps=peel_products)]
    for name, mock in zip(("peel", "peel_products"), peeled, strict=True):
        monkeypatch.setattr(obs, name, mock)
    monkeypatch.setattr(obs, "BATCH_BYTES", 2 * each)
    parts = removal_path(normal, down)
    calls = [call for mock in peeled for call in mock.call_args_list]
    assert [len(call.args[0]) for call in calls] == [2, 2, 1]
    assert parts.order_NI.tolist() == whole.order_NI.tolist()
    assert torch.allclose(parts.error_NI, whole.error_NI, rtol=1e-9)


@pytest.mark.parametrize("hidden", [4, 20])
def test_errors_count_in_the_metric(hidden: int) -> None:
    """A root of the metric does what it does to the weights: tr(M ΔᵀΔ), by weights or products."""
    torch.manual_seed(7)
    p, down, root = torch.randn(90, 12), torch.randn(3, hidden, 12), torch.randn(hidden, hidden)
    normal = (p.T @ p).expand(3, 12, 12)
    there = removal_path(normal, down, root_DD=root)
    expected = removal_path(normal, root.T @ down)
    assert torch.equal(there.order_NI, expected.order_NI)
    assert torch.allclose(there.error_NI, expected.error_NI, rtol=1e-4)
    assert not torch.equal(there.order_NI, removal_path(normal, down).order_NI)


def test_nothing_removed_costs_nothing() -> None:
    """In the precision of the errors, so that the two can be added up."""
    path = removal_path(torch.eye(4)[None], torch.ones(1, 2, 4))
    kept = path.error_at(4)
    assert (kept.tolist(), kept.dtype) == ([0.0], path.error_at(3).dtype)


def test_order_is_nearly_optimal() -> None:
    """Half of eight neurons: within 10 % of the best of all 70 subsets."""
    torch.manual_seed(5)
    p = torch.randn(100, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    down = torch.randn(3, 8, dtype=torch.float64)
    path = removal_path((p.T @ p).float()[None], down.float()[None], ridge=0.01)
    ridge = 0.01 * float((p.T @ p).diagonal().mean())
    best = min(
        added_error(p, down.T, list(kept), ridge) for kept in itertools.combinations(range(8), 4)
    )
    assert float(path.error_at(4)[0]) <= 1.1 * best


def test_every_expert_is_damped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP32, where a cast is no copy: equal experts have equal paths, the input is untouched."""
    monkeypatch.setattr(obs, "_FP64_WIDTH", 0)
    torch.manual_seed(3)
    p = torch.randn(50, 6)
    normal = (p.T @ p).expand(4, 6, 6).clone()
    before = normal.clone()
    path = removal_path(normal, torch.randn(1, 3, 6).expand(4, 3, 6), ridge=1.0)
    assert torch.equal(normal, before)
    assert torch.equal(path.error_NI, path.error_NI[:1].expand(4, 6))


@pytest.mark.parametrize("step", [1, 3, 70])
def test_products_of_weights_lead_the_same_way(step: int) -> None:
    """Put off for many rounds, none or in part: the path of the weights themselves."""
    torch.manual_seed(8)
    width, hidden = 230, 240
    p = torch.randn(3, 400, width) @ (torch.randn(width, width) / 9 + torch.eye(width))
    p[1] = 0.0
    weight = torch.randn(3, width, hidden, dtype=torch.float64)
    weight[2, 5:9] = 0.0
    weight[2, 11] = weight[2, 10]
    normal = p.transpose(1, 2) @ p
    inverse = torch.stack([damped_inverse(normal, expert, 0.01) for expert in range(3)])
    product = weight @ weight.transpose(1, 2)
    order, error = peel_products(inverse.clone(), product, step)
    expected_order, expected_error = peel(inverse, weight, step)
    assert torch.equal(order, expected_order)
    assert torch.allclose(error, expected_error, rtol=1e-9, atol=1e-9)
    assert bool((error.diff(dim=1) >= 0).all())


def test_weights_that_others_make_up_for_add_no_gain() -> None:
    """In FP32, where two opposite neurons that fire alike leave rounding instead of nothing."""
    torch.manual_seed(9)
    p = torch.randn(300, 20)
    p[:, 1] = p[:, 0]
    weight = torch.randn(1, 20, 30)
    weight[:, 1] = -weight[:, 0]
    inverse = torch.linalg.inv(p.T @ p + 1e-3 * torch.eye(20))[None]
    order, error = peel_products(inverse, weight @ weight.transpose(1, 2), 1)
    assert set(order[0, :2].tolist()) == {0, 1}
    assert bool((error.diff(dim=1) >= 0).all())
    assert float(error[0, 0]) >= 0.0


@pytest.mark.parametrize("step", [1, 5])
def test_a_gpu_computes_without_a_stop(step: int) -> None:
    """Tensors without values: no other device takes part, and no value is asked for."""
    square, weight = (
        torch.empty(3, 40, columns, dtype=torch.float64, device="meta") for columns in (40, 7)
    )
    for order, error in (
        peel(square.clone(), weight, step),
        peel_products(square.clone(), square.clone(), step),
    ):
        assert order.shape == error.shape == (3, 40)
        assert order.is_meta
        assert error.is_meta
