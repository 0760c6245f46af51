"""Damage is seen, size is not taken for damage."""

from __future__ import annotations

import pytest
import torch

from moe_serve.checkpoint.finite import all_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [INF, -INF], [NAN, INF]])
def test_one_that_is_none_is_seen(bad: list[float], dtype: torch.dtype) -> None:
    """Also infinities that would cancel."""
    tensor = torch.randn(3, 50).to(dtype)
    tensor[1, : len(bad)] = torch.tensor(bad, dtype=dtype)
    assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_whose_sum_overflows_are_numbers(dtype: torch.dtype) -> None:
    """As are none."""
    assert all_finite(torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.randn(5, 5).to(dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
