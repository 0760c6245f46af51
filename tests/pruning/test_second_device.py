"""Pruning on a device of its own gives what it gives on the processor, and mixes no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.evaluation.comparison import compare
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.apart import second_device
from tests.support.models import make_model, write_texts
from tests.support.quantised import quantise_model

CASES: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "healed": ("qwen3_moe", None, {"method": "block-obs", "heal": True}, "compact"),
    "weighed": ("deepseek_v3", None, {"method": "auto", "router_refit": True}, "compact"),
    "merged": ("qwen2_moe", None, {"method": "merge-msmoe", "uniform": True}, "native"),
    "constants": ("qwen3_moe", None, {"method": "auto", "constants": True}, "substitution"),
    "tiles": ("qwen3_moe", "fp8-tiles", {"method": "block-obs"}, "compact"),
    "rounded": ("qwen3_moe", "int4", {"method": "block-obs", "requantise": True}, "compact"),
}


def _prune(
    model: Path, output: Path, texts: Path, wanted: dict[str, Any], form: str, device: torch.device
) -> float:
    """Prune, then measure there as well; the mean KL."""
    request = PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(paths=(texts,), tokens=400, length=64),
        selection=Selection(keep=0.5, **wanted),
        form=form,
        device=device,
    )
    prune(request, Silent())
    few = TextOptions(paths=(texts,), tokens=200, length=64)
    return compare(model, output, few, device, allow_overlap=True).mean.kl_nats


@pytest.mark.parametrize("case", CASES)
def test_a_device_of_its_own_gives_the_same(case: str, tmp_path: Path) -> None:
    """What it does to the model; an operand left behind on the processor would be an error."""
    family, layout, wanted, form = CASES[case]
    model, texts = make_model(tmp_path / "m", family), write_texts(tmp_path / "t.jsonl")
    if layout is not None:
        quantise_model(model, tmp_path / "q", layout)
        model = tmp_path / "q"
    here = _prune(model, tmp_path / "here", texts, wanted, form, torch.device("cpu"))
    with second_device() as device:
        there = _prune(model, tmp_path / "there", texts, wanted, form, device)
    assert there == pytest.approx(here, rel=0.01)


def test_the_second_device_is_one() -> None:
    """The processor's tensors don't mix with its own, unless they are numbers or indexes."""
    with second_device() as device:
        there, here = torch.ones(3, 3, device=device), torch.ones(3, 3)
        assert (there * torch.tensor(2.0))[torch.tensor([0, 2])].sum().item() == 12
        with pytest.raises(RuntimeError, match="two devices"):
            there @ here
        with pytest.raises(RuntimeError, match="two devices"):
            here[torch.tensor([0], device=device)]
        with pytest.raises(RuntimeError, match="two devices"):
            there.index_select(0, torch.tensor([0]))
