"""What a comparison of directories refuses; its figures are tested with the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_serve.errors import CheckpointError
from moe_serve.evaluation.comparison import compare
from moe_serve.evaluation.stored import StoredModel
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions
from tests.support.models import change_weights, make_model, write_texts


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model whose logits overflow, though all its weights are numbers."""
    path = make_model(tmp_path / "broken", "qwen3_moe")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][:] = 3e38

    change_weights(path, spoil)
    return path


def test_what_is_no_number_is_no_figure(broken: Path, tmp_path: Path) -> None:
    """NaN is above no tolerance; on either side it is refused by name, in tasks as well."""
    sound = make_model(tmp_path / "sound", "qwen3_moe")
    texts = TextOptions(paths=(write_texts(tmp_path / "t.jsonl"),), tokens=128, length=64)
    for pair in ((sound, broken), (broken, sound)):
        with pytest.raises(CheckpointError, match=r"broken: expects something that is no number"):
            compare(*pair, texts)
    with pytest.raises(CheckpointError, match="no number"):
        list(StoredModel.at(broken, torch.device("cpu"), 64).expect([[1, 2, 3]], 2, SILENT))
