"""Statistics in which experts weigh as often as production selected them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_serve.calibration.store import Statistics
from moe_serve.calibration.traffic import METRIC, read_traffic
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli.app import app
from moe_serve.errors import CalibrationError
from tests.support.calibrated import calibrated
from tests.support.models import make_model

EXPERTS = 4


def page(path: Path, counts: dict[int, list[int]]) -> Path:
    """A ``/metrics`` page as an engine writes it."""
    lines = [f"# TYPE {METRIC.removesuffix('_total')} counter", "vllm:other_total 3"]
    for layer, numbers in counts.items():
        lines += [
            f'{METRIC}{{variant="original",model="m",layer="{layer}",expert="{e}"}} {n}.0'
            for e, n in enumerate(numbers)
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_experts_count_as_often_as_in_production(tmp_path: Path) -> None:
    """Shares of selections are the traffic's, two pages added; means per selection stay.

    Layer 0: (10 + 30, 20, 30, 10) of 100.
    """
    model = make_model(tmp_path / "m", "qwen3_moe", experts=EXPERTS)
    plain = calibrated(model, tmp_path)
    first = page(tmp_path / "a.txt", {0: [10, 20, 30, 10], 1: [1, 1, 1, 1]})
    second = page(tmp_path / "b.txt", {0: [30, 0, 0, 0], 1: [0, 0, 0, 0]})
    command = ["calibrate", str(model), str(tmp_path / "shifted")]
    command += ["--calibration", str(tmp_path / "texts.jsonl"), "--tokens", "1024"]
    command += ["--sequence-length", "128", "--batch-tokens", "512", "--device", "cpu"]
    command += ["--from-traffic", str(first), "--from-traffic", str(second)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    shifted = Statistics(tmp_path / "shifted")
    before, after = plain.layer(0), shifted.layer(0)
    assert after.frequency().tolist() == pytest.approx([0.4, 0.2, 0.3, 0.1])
    assert torch.allclose(after.reap(), before.reap())
    factor = after.frequency() / before.frequency()
    assert torch.allclose(after.normal_NII[2], before.normal_NII[2] * float(factor[2]), rtol=1e-5)
    assert torch.equal(after.reservoir_SD, before.reservoir_SD)
    gradients = shifted.gradients(0)
    assert torch.equal(gradients.metric_DD, plain.gradients(0).metric_DD)
    reached = gradients.reached_N / gradients.reached_N.sum()
    assert reached.tolist() == pytest.approx([0.4, 0.2, 0.3, 0.1])


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({0: [1] * 5, 1: [1] * 4}, "a model with 4 experts in layers 0, 1"),
        ({0: [1] * 4, 7: [1] * 4}, "a model with 4 experts in layers 0, 1"),
        ({0: [1] * 4}, "count no selection in layers 1"),
    ],
)
def test_pages_of_another_model_are_refused(
    tmp_path: Path, counts: dict[int, list[int]], words: str
) -> None:
    """Too many experts, a layer without any, a layer that is missing."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe", experts=EXPERTS))
    with pytest.raises(CalibrationError, match=words):
        read_traffic([page(tmp_path / "page.txt", counts)], checkpoint)
