"""Hidden states of all calibration tokens, on disk between layers.

They live in a plain file, read and written by range: memory stays at one batch whatever the
number of tokens, and a killed run continues from the last whole file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moe_serve.files import writing


class States:
    """A [T, D] matrix of FP32 in a file."""

    def __init__(self, path: Path, hidden: int) -> None:
        """Address ``path``; nothing is read or made yet."""
        self.path = path
        self._row = hidden * 4
        self._hidden = hidden

    def size(self, tokens: int) -> int:
        """Bytes on disk of that many rows."""
        return tokens * self._row

    def write(self, start: int, rows_TD: torch.Tensor) -> None:
        """Store rows beginning at token ``start``."""
        data = rows_TD.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        mode = "r+b" if self.path.exists() else "w+b"
        with writing(self.path), self.path.open(mode) as file:
            file.seek(start * self._row)
            file.write(data)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Rows ``start`` to ``start + count`` as FP32 [count, D]."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(start * self._row)
            data = np.fromfile(file, dtype=np.float32, count=count * self._hidden)
        return torch.from_numpy(data.reshape(count, self._hidden))

    def remove(self) -> None:
        """Delete the file if it is there."""
        self.path.unlink(missing_ok=True)
