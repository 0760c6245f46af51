"""The table's arithmetic, and a whole benchmark on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quality import methods
from benchmarks.quality.contestants import PEERS, contestants
from benchmarks.quality.summary import Run, markdown, summarise
from moe_serve.errors import UsageError
from moe_serve.pruning.methods.registry import METHODS
from tests.support.models import make_model, write_texts


def run(label: str, kind: str, seed: int, kl_mean: float, kl_worst: float) -> Run:
    """At half the bytes."""
    return Run(
        label=label,
        kind=kind,
        keep=0.5,
        seed=seed,
        bytes_kept=0.5,
        kl_mean=kl_mean,
        kl_worst=kl_worst,
        worst_domain="code",
        top1=0.9,
        seconds=1.0,
    )


def test_ratios_are_to_the_best_peer_of_each_kind_over_seeds() -> None:
    """Peer A has means (.2, .4) → .3 and worst .9; B mean .4, worst .8; ours .06 and .2."""
    runs = [
        run("A", "expert peer", 0, 0.2, 0.9),
        run("A", "expert peer", 1, 0.4, 0.9),
        run("B", "expert peer", 0, 0.4, 0.8),
        run("B", "expert peer", 1, 0.4, 0.8),
        run("C", "neuron peer", 0, 0.1, 0.4),
        run("C", "neuron peer", 1, 0.1, 0.4),
        run("A + re-fit", "peer + re-fit", 0, 0.01, 0.01),
        run("ours", "ours", 0, 0.06, 0.2),
    ]
    rows, best = summarise(runs, 0.5)
    assert best == {
        "expert peer": {"kl_mean": "A", "kl_worst": "B"},
        "neuron peer": {"kl_mean": "C", "kl_worst": "C"},
    }
    assert [row.label for row in rows] == ["A + re-fit", "ours", "C", "A", "B"]
    ours, a = rows[1], rows[3]
    assert ours.ratios["expert peer"] == pytest.approx((0.06 / 0.3, 0.2 / 0.8))
    assert ours.ratios["neuron peer"] == pytest.approx((0.6, 0.5))
    assert a.spread == pytest.approx(0.1 * 2**0.5)  # (.2, .4) around .3 with n - 1
    assert "best expert peer: A (mean), B (worst domain)" in markdown(rows, best)


def test_peers_run_as_published_and_again_with_the_refit() -> None:
    """Every method takes part; a peer's first row is without compensation."""
    rows = contestants([], refits=True)
    assert {row.selection.method for row in rows} == set(METHODS)
    assert all(peer.selection.refit is False for peer in PEERS)
    assert len([row for row in rows if row.kind == "peer + re-fit"]) == len(PEERS)
    assert {row.label for row in rows if row.kind == "ours"} >= {"block-obs", "merge-cka"}
    with pytest.raises(UsageError, match="no method 'drop-best'"):
        contestants(["drop-best"], refits=False)


def test_a_stopped_benchmark_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of the first call are taken over; statistics are gathered once per seed."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    calibration = write_texts(tmp_path / "calibration.jsonl")
    heldout = write_texts(tmp_path / "heldout.jsonl", seed=1)
    figures = tmp_path / "figures.json"

    def call(*names: str) -> None:
        argv = ["methods", "--model", str(model), "--calibration", str(calibration)]
        argv += ["--heldout", str(heldout), "--keep", "0.5", "--tokens", "256", "--length", "64"]
        argv += ["--heldout-tokens", "256", "--no-refits", "--json", str(figures)]
        argv += ["--statistics", str(tmp_path / "statistics"), "--methods", *names]
        monkeypatch.setattr(sys, "argv", argv)
        assert methods.main() == 0

    call("drop-reap")
    first = json.loads(figures.read_text())["runs"]
    assert [r["label"] for r in first] == ["drop-reap"]
    call("drop-reap", "merge-ream")
    found = json.loads(figures.read_text())
    assert found["runs"][0] == first[0]
    assert [r["label"] for r in found["runs"]] == ["drop-reap", "merge-ream"]
    assert found["tables"][0]["best"]["expert peer"]["kl_mean"] in {"drop-reap", "merge-ream"}
    captured = capsys.readouterr()
    assert captured.err.count("calibrated in") == 1
    assert "| drop-reap | expert peer | 50.0% |" in captured.out
