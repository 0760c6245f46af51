"""``moe-serve demo`` from beginning to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_demo_prunes_serves_compares_and_rolls_back(tmp_path: Path) -> None:
    """On the fixture: half the expert bytes, real engines, no failed request."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_serve", "demo", "--json", "--output", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=1500,  # A guard against hanging; it takes a few minutes.
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    sizes = found["prune"]["expert_bytes"]
    assert 0.45 * sizes["original"] < sizes["kept"] <= 0.5 * sizes["original"]
    assert found["failed"] == 0
    assert found["requests"]["0 %"]["original"] > 0
    assert found["requests"]["100 %"]["pruned"] > 0
    assert found["requests"]["rollback"]["original"] > 0
    quality = found["compare"]["quality"]
    assert len(quality["domains"]) == 7
    assert 0 < quality["mean"]["kl_nats"] < 0.3
    assert quality["mean"]["top1_agreement"] > 0.7
    assert found["compare"]["overlap"] == []
    assert "6/6 move traffic under load" in done.stderr
    assert not list((tmp_path / "demo").glob("*.partial"))
