"""The balance for the worst domain: the rule by hand, and the choice through a real run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_serve.calibration.sequences import Sequences
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.staging import WORK
from moe_serve.errors import CalibrationError, UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.forecasts.dryrun import dry_run
from moe_serve.pruning.ground import Measured
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.worst import ROUNDS, Round, best, reweighted, split
from tests.support.models import make_model, write_texts


def test_a_step_of_multiplicative_weights() -> None:
    """Losses 2, 1, 0 over even parts: e, e^0.5 and 1, over their sum."""
    found = reweighted((1 / 3,) * 3, (2.0, 1.0, 0.0))
    total = math.e + math.exp(0.5) + 1.0
    assert found == pytest.approx((math.e / total, math.exp(0.5) / total, 1 / total))
    assert reweighted((0.5, 0.5), (0.0, 0.0)) == (0.5, 0.5)


def test_equal_losses_change_nothing() -> None:
    """Balanced is where the rule stays."""
    assert reweighted((0.7, 0.3), (0.4, 0.4)) == pytest.approx((0.7, 0.3))


def rounds(*worst: float) -> list[Round]:
    """Rounds that measured so."""
    return [
        Round(balance={"a": float(i)}, measured=Measured(0.0, kl, {})) for i, kl in enumerate(worst)
    ]


def test_even_parts_stay_unless_beaten_by_the_margin() -> None:
    """0.99 of the first round's KL is within the margin of 2 %, 0.97 is not."""
    assert best(rounds(1.0, 0.99, 1.2)).balance == {"a": 0.0}
    assert best(rounds(1.0, 0.97, 0.9)).balance == {"a": 2.0}


def test_the_last_sequences_measure() -> None:
    """Of eight sequences the last two, of two the last; one alone is refused."""

    def corpus(*counts: int) -> Sequences:
        owners = [d for d, count in enumerate(counts) for _ in range(count)]
        tokens = tuple(np.zeros(16, dtype=np.int64) for _ in owners)
        domains = tuple("abc"[: len(counts)])
        return Sequences(domains=domains, tokens=tokens, domain=tuple(owners))

    assert split(corpus(8, 2)) == ([0, 1, 2, 3, 4, 5, 8], [6, 7, 9])
    with pytest.raises(CalibrationError, match="domain 'b' has one sequence"):
        split(corpus(8, 1))


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> PruneRequest:
    """A tiny model, and two domains of which one has a sixth of the documents."""
    root = tmp_path_factory.mktemp("worst")
    make_model(root / "m", "qwen3_moe", experts=8, width=64)
    lines = write_texts(root / "all.jsonl").read_text().split("\n")
    vowels = [line for line in lines if json.loads(line)["domain"] == "vowels"]
    others = [line for line in lines if line not in vowels]
    (root / "texts.jsonl").write_text("\n".join(others + vowels[:2]))
    return PruneRequest(
        model=root / "m",
        output=root / "out",
        texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=64),
        selection=Selection(keep=0.5, objective="worst-domain"),
        batch_tokens=512,
    )


def test_the_worst_domain_is_never_worse_than_with_even_parts(request_: PruneRequest) -> None:
    """The balance taken is that of the best round measured, and plan and manifest tell all."""
    prune(request_, Silent())
    plan = Plan.load(request_.output / "plan.json")
    told = [Round.from_json(row) for row in plan.settings["rounds"]]
    assert len(told) == ROUNDS
    assert set(told[0].balance.values()) == {0.5}
    hard = max(told[0].measured.domains, key=lambda name: told[0].measured.domains[name])
    assert told[1].balance[hard] > 0.5
    chosen = next(row for row in told if row.balance == plan.balance)
    assert chosen.measured.worst <= told[0].measured.worst
    manifest = Manifest.load(request_.output)
    assert manifest.settings["objective"] == "worst-domain"
    assert (manifest.calibration or {})["balance"] == plan.balance


def test_carrying_out_the_plan_gives_the_same_weights(
    request_: PruneRequest, tmp_path: Path
) -> None:
    """The plan brings its balance along; nothing is searched again."""
    again = replace(
        request_,
        output=tmp_path / "again",
        selection=Selection(),
        plan=request_.output / "plan.json",
    )
    files = prune(again, Silent()).manifest.files
    first = Manifest.load(request_.output).files
    assert files["model.safetensors"] == first["model.safetensors"]


def test_a_killed_round_leaves_one_folder(
    request_: PruneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is killed, and each time it begins in an empty one."""
    out = replace(request_, output=tmp_path / "out")
    work = tmp_path / "out.partial" / WORK

    def killed(*_: object, **__: object) -> None:
        assert not list(work.glob("balance*/left"))
        # As by SIGKILL: nothing is tidied up any more.
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr("moe_serve.pruning.worst.make_plan", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(out, Silent())
        monkeypatch.undo()
        (folder,) = work.glob("balance*")
        (folder / "left").touch()


def test_the_dry_run_counts_the_rounds(request_: PruneRequest, tmp_path: Path) -> None:
    """Three steps for the balance, the first four times a calibration's passes."""
    steps = dry_run(replace(request_, output=tmp_path / "out")).forecast.steps
    found = {step.name: step for step in steps}
    once = [name for name in found if name.startswith("balance domains: ")]
    assert len(once) == 3
    assert found["balance domains: calibrate"].passes == ROUNDS * found["calibrate"].passes


def test_contradictions_are_refused(request_: PruneRequest, tmp_path: Path) -> None:
    """No texts; weights that are fixed already; a word that is no objective."""
    out = replace(request_, output=tmp_path / "out")
    with pytest.raises(UsageError, match="without calibration texts"):
        prune(replace(out, texts=TextOptions(paths=())), Silent())
    task = write_texts(tmp_path / "task.jsonl", seed=3)
    with pytest.raises(UsageError, match="a task's would fix"):
        prune(replace(out, texts=replace(out.texts, task_paths=(task,))), Silent())
    with pytest.raises(UsageError, match="choose from mean, worst-domain"):
        prune(replace(out, selection=Selection(keep=0.5, objective="best")), Silent())
