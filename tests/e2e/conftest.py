"""One stack for all tests here that ask it: its engines take a minute to start."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.running import Running, command

POLICY = """
warmup_seconds = 0
interval_seconds = 1
[[steps]]
weight = 50
min_seconds = 3600
"""
"""A step that no test is long enough to leave."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The fixture model and half of it; the last of its tests stops it."""
    root = tmp_path_factory.mktemp("stack")
    request = PruneRequest(
        model=MODEL,
        output=root / "pruned",
        texts=TextOptions(paths=(CALIBRATION,), tokens=2048, length=256),
        # Choosing by trial is the demo's; here a minute matters.
        selection=Selection(keep=0.5, method="block-obs"),
    )
    prune(request, Silent())
    log = (root / "up.log").open("w")
    policy = root / "policy.toml"
    policy.write_text(POLICY)
    process = subprocess.Popen(
        command(
            MODEL, root / "pruned", root / "state", "--model", "fixture", "--policy", str(policy)
        ),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "MOE_SERVE_EXPERT_SELECTIONS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (root / "up.log").read_text()
    yield Running(process=process, info=json.loads(line))
    process.terminate()
    process.wait(90)
    log.close()


@pytest.fixture(scope="session")
def later() -> Iterator[ExitStack]:
    """What ends with the stack: an engine that later tests ask too."""
    with ExitStack() as stack:
        yield stack
