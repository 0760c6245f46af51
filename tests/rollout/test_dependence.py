"""How alike a user's requests are: against what was put in, and against the real proxy's lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from moe_serve.rollout.dependence import alike, correlation
from moe_serve.rollout.users import lines
from moe_serve.serving.listener import users_file
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import proxied
from tests.support.stacks import fake_stack


def test_the_estimator_by_hand() -> None:
    """Two users who always fail, two who never do: correlation 1. Each half and half: below 0.

    Four users of two requests, one event each: between them nothing, within 4 · ½ over 4 degrees:
    (0 - ½) / (0 + (2 - 1) · ½) = -1.
    """
    always = np.array([[2.0, 2.0], [2.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    assert correlation({PRUNED: always}) == pytest.approx(1.0)
    halves = np.array([[1.0, 2.0]] * 4)
    assert correlation({PRUNED: halves}) == pytest.approx(-1.0)


def test_variants_that_differ_are_not_users_who_do() -> None:
    """Everybody fails in a tenth on one side, in a half on the other: no correlation."""
    rng = np.random.default_rng(1)

    def crowd(rate: float) -> np.ndarray:
        return np.array([[rng.binomial(20, rate), 20] for _ in range(2000)], dtype=float)

    assert abs(correlation({ORIGINAL: crowd(0.1), PRUNED: crowd(0.5)})) < 0.01


def run(state: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """``moe-serve rollout dependence``."""
    command = [sys.executable, "-m", "moe_serve", "rollout", "dependence", "--state", str(state)]
    return subprocess.run(
        [*command, *more], capture_output=True, text=True, check=False, timeout=120
    )


def written(file: Path, seed: int, users: int, rate: float, alike_: float) -> None:
    """Beta-binomial users, some far busier than others: the correlation is 1 / (a + b + 1)."""
    rng = np.random.default_rng(seed)
    spread = (1.0 - alike_) / alike_
    text = []
    for user in range(users):
        leaning = rng.beta(rate * spread, (1.0 - rate) * spread)
        for _ in range(1 + int(rng.lognormal(1.0, 1.0))):
            status = 503 if rng.random() < leaning else 200
            text.append(f"1 {user:016x} pruned {status} - {int(rng.integers(100, 900))}\n")
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(text))


def test_the_upper_end_covers_what_was_put_in(tmp_path: Path) -> None:
    """In at least 34 of 40 crowds of 600 users, whose mean is near it; times are nobody's."""
    ends, middles = [], []
    for seed in range(40):
        written(tmp_path / "logs" / "users.log", seed, users=600, rate=0.05, alike_=0.1)
        failed, slow, left = alike(tmp_path / "logs" / "users.log")
        assert failed.at_most is not None
        assert failed.correlation is not None
        ends.append(failed.at_most)
        middles.append(failed.correlation)
        assert slow.correlation is not None
        assert abs(slow.correlation) < 0.05
        assert (left.events, left.correlation) == (0, None)
    assert sum(end >= 0.1 for end in ends) >= 34
    assert np.mean(middles) == pytest.approx(0.1, abs=0.02)


def test_too_little_says_nothing(tmp_path: Path) -> None:
    """Few users, or few failures: no figure, and the command keeps the default."""
    fake_stack(tmp_path)
    written(users_file(tmp_path), 0, users=50, rate=0.05, alike_=0.1)
    failed, *_ = alike(users_file(tmp_path))
    assert (failed.correlation, failed.at_most) == (None, None)
    done = run(tmp_path)
    assert (done.returncode, "keep the default" in done.stdout) == (0, True)
    users_file(tmp_path).unlink()
    done = run(tmp_path)
    assert (done.returncode, "users.log" in done.stderr) == (2, True)


def test_the_command_advises_the_largest_end(tmp_path: Path) -> None:
    """Of failures and slowness; and once more for the guard that patience matters to."""
    fake_stack(tmp_path)
    written(users_file(tmp_path), 0, users=600, rate=0.2, alike_=0.1)
    told = json.loads(run(tmp_path, "--json").stdout)
    failed, slow, left = told["alike"]
    assert told["dependence"] == max(failed["at_most"], slow["at_most"])
    assert told["dependence"] > 0.1
    assert (told["with_abandoned"], left["at_most"]) == (None, None)
    assert f"dependence = {told['dependence']:.3f}" in run(tmp_path).stdout
    # The same people, who leave instead of failing.
    text = users_file(tmp_path).read_text().replace(" 503 - ", " 0 DC ")
    users_file(tmp_path).write_text(text)
    told = json.loads(run(tmp_path, "--json").stdout)
    assert told["alike"][2] == {**failed, "what": "left"}
    assert told["with_abandoned"] == max(failed["at_most"], told["alike"][1]["at_most"])
    assert told["dependence"] == told["alike"][1]["at_most"] < 0.1
    shown = run(tmp_path).stdout
    assert f"with the guard abandoned: dependence = {told['with_abandoned']:.3f}" in shown


def test_the_proxy_notes_how_it_ended(tmp_path: Path) -> None:
    """One answered, one that the engine refused; each with its time."""
    with proxied(tmp_path, chunks=2, pause=0.05) as proxy:
        url, who = f"{proxy.endpoint}/completions", {"x-user-id": "ada"}
        body = {"model": "m", "prompt": "x", "stream": True}
        assert httpx.post(url, json=body, headers=who).status_code == 200
        proxy.original.fail_every = 1
        assert httpx.post(url, json=body, headers=who).status_code >= 500
    found = list(lines(users_file(tmp_path).read_bytes()))
    assert [(line.variant, line.failed) for line in found] == [(ORIGINAL, False), (ORIGINAL, True)]
    assert 0.05 <= found[0].seconds < 60.0
    assert found[0].user == found[1].user
