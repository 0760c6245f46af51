"""An output's tensors beside its experts, in each number format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "form"),
    [("glm4_moe", "compact"), ("deepseek_v3", "compact"), ("deepseek_v3", "tied")],
)
def test_a_dropped_experts_bias_is_a_number(
    family: str, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also where -1e30 is none: F16 ends at -65504."""
    request = PruneRequest(
        model=make_model(tmp_path / "m", family, dtype=dtype),
        output=tmp_path / "out",
        texts=TextOptions(paths=()),
        selection=Selection(keep=0.5, method="drop-random"),
        form=form,
    )
    prune(request, Silent())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    bias_N = weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias_N.dtype == dtype
    assert int((bias_N <= -65504).sum()) == 4
    assert verify(tmp_path / "out", progress=Silent()).problems == []
