"""Removal in whole tiles against plain least squares."""

from __future__ import annotations

import torch

from moe_serve.pruning.methods.tiles import peel, tile_path, tiles_by_value


def test_error_is_that_of_the_best_refit_without_the_tile() -> None:
    """For each tile alone: the ridge re-fit's error without it, and the least goes first."""
    torch.manual_seed(0)
    p = torch.randn(200, 12).double() @ torch.randn(12, 12).double()
    down = torch.randn(5, 12).double()
    normal = p.T @ p
    ridge = 0.01 * normal.diagonal().mean() * torch.eye(12).double()

    def error(gone: list[int]) -> float:
        """Least of ‖P W - P_R V‖² + λ‖W - V‖² over V with the rows of ``gone`` zero."""
        kept = [i for i in range(12) if i not in gone]
        h = normal + ridge
        best = torch.zeros(12, 5).double()
        best[kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ down.T)
        off = down.T - best
        return float((off * (h @ off)).sum())

    path = tile_path(normal.float()[None], down.float()[None], 4)
    assert path.order_NI.dtype == torch.int64
    first = path.order_NI[0, :4].tolist()
    costs = {t: error(list(range(4 * t, 4 * t + 4))) for t in range(3)}
    least = min(costs, key=costs.__getitem__)
    assert first == list(range(4 * least, 4 * least + 4))
    torch.testing.assert_close(float(path.error_NI[0, 3]), costs[least], rtol=1e-3, atol=0)
    second = path.order_NI[0, :8].tolist()
    torch.testing.assert_close(float(path.error_NI[0, 7]), error(second), rtol=1e-3, atol=0)


def test_tiles_go_whole_and_a_short_one_first() -> None:
    """10 neurons in tiles of 4: the last two first, then 3 + 3 + 0 + 0 before 1 + 2 + 3 + 4."""
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0, 3.0, 3.0, 0.0, 0.0, 9.0, 9.0]])
    path = tiles_by_value(value, 4)
    assert path.order_NI.tolist() == [[8, 9, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert path.error_NI.tolist() == [[18.0] * 2 + [24.0] * 4 + [34.0] * 4]
    assert path.error_at(8).tolist() == [18.0]
    assert sorted(path.kept(0, 4)) == [0, 1, 2, 3]
    torch.manual_seed(0)
    normal = torch.eye(10)[None]
    assert tile_path(normal, torch.randn(1, 3, 10), 4).order_NI[0, :2].tolist() == [8, 9]


def test_a_gpu_computes_without_a_stop() -> None:
    """Tensors without values: no other device takes part, and no value is asked for."""
    order, error = peel(torch.empty(42, 42, device="meta"), torch.empty(42, 7, device="meta"), 8)
    assert order.shape == error.shape == (42,)
    assert order.is_meta
    assert error.is_meta
