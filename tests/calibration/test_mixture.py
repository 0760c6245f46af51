"""What a layer is made of that is no tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.calibration.mixture import read_mixture
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import UnsupportedFamily
from tests.support.models import make_model

CPU = torch.device("cpu")


def test_an_unknown_activation_is_refused_by_name(tmp_path: Path) -> None:
    """Nothing stands in for a function that isn't known."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": "snake"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFamily, match=r"config\.json.*'snake'.*silu"):
        read_mixture(open_checkpoint(model), 0, CPU)
