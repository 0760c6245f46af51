"""Which statistics an output rests on, also after a kill."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moe_serve.calibration.store import RECORD, Statistics
from moe_serve.errors import OutputError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.device import CPU
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts


def test_a_run_goes_on_with_the_statistics_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, and the same ones weighed otherwise, would go into half of the output."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    for name, tokens in (("first", 512), ("second", 256)):
        texts = TextOptions(
            paths=(write_texts(tmp_path / "texts.jsonl"),), tokens=tokens, length=64
        )
        calibrate(model, tmp_path / name, texts, CPU, 256, Silent())
    shutil.copytree(tmp_path / "first", tmp_path / "weighed")
    record = tmp_path / "weighed" / RECORD
    counts = {layer: [1, 2, 3, 4, 5, 6, 7, 8] for layer in "01"}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"traffic": counts}))
    begun = PruneRequest(
        model=model,
        output=tmp_path / "out",
        texts=TextOptions(paths=()),
        statistics=tmp_path / "first",
        selection=Selection(keep=0.5, method="drop-frequency", refit=False, router_refit=False),
        batch_tokens=256,
    )

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_serve.pruning.run.apply_plan", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(begun, Silent())
    monkeypatch.undo()
    digest = Statistics(tmp_path / "first").sha256
    for name in ("second", "weighed"):
        words = (
            rf"--statistics .*{name}: .*out\.partial rests on other statistics: .*{digest}; repeat"
        )
        with pytest.raises(OutputError, match=words):
            prune(replace(begun, statistics=tmp_path / name), Silent())
    prune(begun, Silent())
    assert Plan.load(tmp_path / "out" / "plan.json").statistics_sha256 == digest
