"""Experts that calibration hardly saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli import calibrate as command
from moe_serve.pruning.records.coverage import Gap, gaps
from moe_serve.pruning.records.evidence import Evidence, LayerEvidence
from tests.support.calibrated import calibrated
from tests.support.models import make_model


def test_a_gap_names_the_domain_that_would_close_it() -> None:
    """Tokens below the width; the rest at the rate of the domain that selects it most."""
    layer = LayerEvidence(
        tokens_CN=((64, 30, 0), (0, 10, 0)),
        cosine_NN=((100,) * 3,) * 3,
    )
    evidence = Evidence(
        experts=3,
        width=64,
        top_k=1,
        moe_layers=(5,),
        domains=("code", "prose"),
        tokens={"code": 100, "prose": 20},
        layers={5: layer},
    )
    # Expert 0 has its 64. Expert 1: 24 short, half of prose's tokens reach it: 48 more.
    assert gaps(evidence) == [
        Gap(layer=5, expert=2, tokens=0, domain=None, more=None),
        Gap(layer=5, expert=1, tokens=40, domain="prose", more=48),
    ]


def test_evidence_counts_what_the_statistics_counted(tmp_path: Path) -> None:
    """Each token selects top-k experts in every layer; an expert is like itself."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    statistics = calibrated(model, tmp_path)
    evidence = Evidence.of(open_checkpoint(model), statistics)
    for layer in evidence.layers.values():
        assert [sum(row) for row in layer.tokens_CN] == [2 * n for n in evidence.tokens.values()]
        assert all(row[e] == 100 for e, row in enumerate(layer.cosine_NN))
    evidence.save(tmp_path)
    assert Evidence.load(tmp_path) == evidence
    assert "bcd" not in (tmp_path / "evidence.json").read_text()


def test_calibrate_prints_coverage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's JSON carries every gap."""
    model = make_model(tmp_path / "m", "qwen3_moe", width=128)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"domain": "vowels", "text": "aeiou" * 40}))
    command.calibrate_command(
        model, tmp_path / "s", calibration=[texts], coverage=True, as_json=True, device="cpu"
    )
    found = json.loads(capsys.readouterr().out)
    # 200 tokens, two of eight experts each: 400 selections cannot give each expert 128.
    assert found["coverage"]
    assert all(gap["tokens"] < 128 for gap in found["coverage"])
