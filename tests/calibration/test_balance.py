"""How domains weigh: shares of a task, worked out by hand and through a real calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_serve.calibration.balance import for_task, ordered, quotas
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

CPU = torch.device("cpu")


def test_a_task_takes_its_weight_and_the_others_share_the_rest() -> None:
    """A weight of 0.6 over two task domains is 0.3 each; 0.4 over the other one is 0.4."""
    domains = ("a", "task:x", "task:y")
    assert for_task(domains, 0.6) == pytest.approx((0.4, 0.3, 0.3))
    assert for_task(domains, 0.0) == (1.0, 0.0, 0.0)
    assert for_task(domains, 1.0) == (0.0, 0.5, 0.5)
    assert for_task(("task:x",), 1.0) == (1.0,)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_out_of_bounds_is_refused(weight: float) -> None:
    """Weights lie in [0, 1]; no other number, and no NaN."""
    with pytest.raises(UsageError, match=r"not in \[0, 1\]"):
        for_task(("a", "task:x"), weight)


def test_the_rest_needs_somebody_to_take_it() -> None:
    """A weight of 0.5 of task texts alone leaves 0.5 to nobody."""
    with pytest.raises(UsageError, match=r"leaves 0\.5 of the weight"):
        for_task(("task:x",), 0.5)


def test_tokens_weigh_as_the_balance_says() -> None:
    """30 + 10 tokens at 1/4 and 3/4: 40 · 0.25 / 30 = 1/3 and 40 · 0.75 / 10 = 3; mean 1."""
    sequences = Sequences(
        domains=("a", "b"),
        tokens=(np.zeros(30, dtype=np.int64), np.zeros(10, dtype=np.int64)),
        domain=(0, 1),
        balance=(0.25, 0.75),
    )
    weights = sequences.weights()
    assert weights[:30].tolist() == pytest.approx([1 / 3] * 30)
    assert weights[30:].tolist() == pytest.approx([3.0] * 10)
    assert float(weights.mean()) == pytest.approx(1.0)
    # A share keeps the weights that its tokens have among all.
    assert sequences.share([1]).weights().tolist() == pytest.approx([3.0] * 10)
    even = replace(sequences, balance=())
    assert even.weights()[[0, 30]].tolist() == pytest.approx([40 / 2 / 30, 40 / 2 / 10])


def test_the_sample_follows_the_balance() -> None:
    """Of 100 tokens 75 and 25; a domain of 20 gives 20; one without weight none."""
    assert quotas((0.75, 0.25, 0.0), (1000, 20, 1000), 100) == (75, 20, 0)
    assert quotas((0.999, 0.001), (1000, 1000), 100) == (99, 1)


def test_a_recorded_balance_belongs_to_its_domains() -> None:
    """Order does not matter, names do."""
    assert ordered({"b": 0.75, "a": 0.25}, ("a", "b")) == (0.25, 0.75)
    with pytest.raises(UsageError, match="hold the domains a, c, the plan weighs a, b"):
        ordered({"a": 0.5, "b": 0.5}, ("a", "c"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, general texts and those of a task."""
    folder = tmp_path_factory.mktemp("balance")
    make_model(folder / "m", "qwen3_moe", experts=8, width=64)
    write_texts(folder / "general.jsonl", seed=1)
    write_texts(folder / "task.jsonl", seed=2)
    return folder


def options(root: Path, weight: float | None, *, general: bool = True) -> TextOptions:
    """Small sequences of both."""
    return TextOptions(
        paths=(root / "general.jsonl",) if general else (),
        task_paths=(root / "task.jsonl",) if weight is not None else (),
        task_weight=weight,
        tokens=512,
        length=64,
    )


def gathered(root: Path, name: str, texts: TextOptions) -> Statistics:
    """Statistics of a run."""
    return calibrate(root / "m", root / name, texts, CPU, 512, Silent())


def test_statistics_mix_linearly(root: Path) -> None:
    """At w the normal matrix is (1 - w) of that without the task and w of the task's own."""
    without = gathered(root, "s-without", options(root, None))
    alone = gathered(root, "s-alone", options(root, 1.0, general=False))
    mixed = gathered(root, "s-mixed", options(root, 0.25))
    none = gathered(root, "s-none", options(root, 0.0))
    assert without.balance is None
    assert mixed.balance is not None
    assert sum(v for k, v in mixed.balance.items() if k.startswith("task:")) == 0.25

    def normal(found: Statistics) -> torch.Tensor:
        layer = found.layer(1)
        return layer.normal_NII.double() / layer.weight

    expected = 0.75 * normal(without) + 0.25 * normal(alone)
    torch.testing.assert_close(normal(mixed), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(normal(none), normal(without), rtol=1e-4, atol=1e-7)
    # So do counts and saliencies, whatever the domains' numbers of tokens.
    one, other = without.layer(1).frequency(), alone.layer(1).frequency()
    torch.testing.assert_close(mixed.layer(1).frequency(), 0.75 * one + 0.25 * other)


def test_the_weight_is_recorded_and_applied_again(root: Path, tmp_path: Path) -> None:
    """Plan and manifest name it; carrying out the plan on the same texts gives the same bytes."""
    request = PruneRequest(
        model=root / "m",
        output=tmp_path / "a",
        texts=options(root, 0.75),
        selection=Selection(keep=0.5),
        batch_tokens=512,
    )
    prune(request, Silent())
    plan = Plan.load(tmp_path / "a/plan.json")
    assert plan.balance is not None
    assert sum(v for k, v in plan.balance.items() if k.startswith("task:")) == 0.75
    assert (Manifest.load(tmp_path / "a").calibration or {})["balance"] == plan.balance
    given = replace(
        request,
        output=tmp_path / "b",
        plan=tmp_path / "a/plan.json",
        texts=replace(request.texts, task_weight=None),
    )
    prune(given, Silent())
    files = [Manifest.load(tmp_path / name).files for name in "ab"]
    # Statistics are gathered to plan only; a run by plan has no evidence from them.
    differing = {name for name in files[0] if files[0][name] != files[1][name]}
    assert differing == {"evidence.json"}
    with pytest.raises(UsageError, match="decided when planning"):
        prune(replace(given, output=tmp_path / "c", texts=request.texts), Silent())
    with pytest.raises(UsageError, match="the plan weighs"):
        prune(replace(given, output=tmp_path / "c", texts=options(root, None)), Silent())


def test_a_document_in_both_is_refused(root: Path) -> None:
    """The error says how many there are."""
    texts = TextOptions(paths=(root / "task.jsonl",), task_paths=(root / "task.jsonl",))
    with pytest.raises(UsageError, match=r"(\d+) of \1 documents are among the calibration texts"):
        load_corpus(open_checkpoint(root / "m"), texts)


def test_a_weight_without_texts_is_refused(root: Path) -> None:
    """There is nothing that it could weigh."""
    texts = TextOptions(paths=(root / "general.jsonl",), task_weight=0.5)
    with pytest.raises(UsageError, match="weighs texts that are not given"):
        load_corpus(open_checkpoint(root / "m"), texts)


def test_statistics_of_other_weights_are_refused(root: Path, tmp_path: Path) -> None:
    """A re-fit would weigh what the choice did not."""
    gathered(root, "s-quarter", options(root, 0.25))
    request = PruneRequest(
        model=root / "m",
        output=tmp_path / "out",
        texts=options(root, 0.5),
        selection=Selection(keep=0.5),
        statistics=root / "s-quarter",
    )
    with pytest.raises(UsageError, match="weigh domains"):
        prune(request, Silent())
