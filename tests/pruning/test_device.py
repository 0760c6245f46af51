"""The device that a run computes on."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import UsageError
from moe_serve.pruning.device import device_named


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    """Also one that no machine has."""
    with pytest.raises(UsageError, match=rf"--device: no device '{name}' here \(.*\); cpu always"):
        device_named(name)


def test_a_device_that_is_here_is_taken() -> None:
    """By default the GPU, where there is one."""
    assert device_named("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_named(None).type == expected
