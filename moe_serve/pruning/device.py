"""Where is computed."""

from __future__ import annotations

from typing import Final

import torch

from moe_serve.errors import UsageError

CPU: Final = torch.device("cpu")


def device_named(name: str | None) -> torch.device:
    """The compute device; by default the first GPU, else the CPU.

    Raises:
        UsageError: it does not exist here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(
            f"no device {name!r} here ({str(exc).splitlines()[0]})",
            where="--device",
            remedy="cpu always works",
        ) from exc
    return device
