"""Whole offline runs on a tiny model of every family, with something planted to be found.

In each mixture layer expert 5 copies expert 2, expert 6 puts out nothing, and neuron 7 of expert 3
neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import PlanError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.plan import LayerPlan, Plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import FAMILIES, change_weights, make_model, write_texts
from tests.support.references import our_logits, reference_logits

COPY, OF, DEAD, DULL, NEURON = 5, 2, 6, 3, 7


@dataclass(frozen=True)
class Case:
    """A family's model with its texts; statistics are gathered once and then read."""

    path: Path
    checkpoint: Checkpoint
    texts: Path
    statistics: Path

    def prune(self, output: Path, form: str = "compact", **selection: object) -> Plan:
        """Prune, verify, and return the plan."""
        wanted = {"keep": 0.5} if "experts" not in selection else {}
        request = PruneRequest(
            model=self.path,
            output=output,
            texts=TextOptions(paths=(self.texts,), tokens=1024, length=128),
            selection=Selection(**(wanted | selection)),  # type: ignore[arg-type]
            form=form,
            batch_tokens=512,
            statistics=self.statistics,
        )
        prune(request, Silent())
        if form == "compact":
            assert verify(output, self.path, Silent()).problems == []
        return Plan.load(output / "plan.json")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A BF16 model of each family."""
    root = tmp_path_factory.mktemp("family")
    path = make_model(root / "m", request.param, dtype=torch.bfloat16)
    opened = open_checkpoint(path)

    def plant(weights: dict[str, torch.Tensor]) -> None:
        for layer in opened.family.moe_layers(opened.config):
            names = [opened.family.expert_names(layer, e) for e in range(8)]
            for copy, original in zip(names[COPY], names[OF], strict=True):
                weights[copy] = weights[original].clone()
            weights[names[DEAD].down].zero_()
            weights[names[DULL].down][:, NEURON] = 0

    change_weights(path, plant)
    return Case(
        path=path,
        checkpoint=open_checkpoint(path),
        texts=write_texts(root / "texts.jsonl"),
        statistics=root / "statistics",
    )


def kept(layer: LayerPlan) -> list[int]:
    """Experts that can be selected."""
    return [e for e, blocks in enumerate(layer.experts) if blocks is not None]


def neurons(layer: LayerPlan, expert: int) -> set[int]:
    """An original expert's neurons that are stored."""
    parts = [part for block in layer.blocks for part in block.parts if part.expert == expert]
    return {neuron for part in parts for neuron in part.neurons}


def test_keeping_everything_is_identity(case: Case, tmp_path: Path) -> None:
    """Keep = 1 gives byte-identical tensors."""
    case.prune(tmp_path / "out", keep=1.0)
    after = open_checkpoint(tmp_path / "out")
    assert case.checkpoint.tensors.keys() == after.tensors.keys()
    for name in after.tensors:
        assert case.checkpoint.read_bytes(name) == after.read_bytes(name)


@pytest.mark.parametrize("method", ["block-obs", "drop-reap", "merge-cka"])
def test_pruned_equals_its_full_size_twin(method: str, case: Case, tmp_path: Path) -> None:
    """Half the bytes; our forward over blocks and table against transformers on the tied export.

    Of the expert without output nothing is kept where neurons are chosen.
    """
    plan = case.prune(tmp_path / "compact", method=method)
    before = sum(case.checkpoint.expert_bytes().values())
    assert sum(open_checkpoint(tmp_path / "compact").expert_bytes().values()) <= before // 2
    for layer in plan.layers.values():
        assert method != "block-obs" or not neurons(layer, DEAD)
    export(tmp_path / "compact", tmp_path / "tied", "tied", Silent())
    mask = tmp_path / "tied/router_mask.safetensors"
    dropped = {i: [e for e, b in enumerate(p.experts) if b is None] for i, p in plan.layers.items()}
    ids = torch.randint(1, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = our_logits(tmp_path / "compact", ids)
    stock = reference_logits(tmp_path / "tied", ids, dropped if mask.exists() else {})
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))


def test_a_copy_is_merged_and_a_dead_expert_dropped_first(case: Case, tmp_path: Path) -> None:
    """Of eight experts seven stay: CKA joins the two equal ones, REAP drops the one without output.

    Where the router ranks groups of two, a whole group has to go: the dead expert's.
    """
    for merged in case.prune(tmp_path / "merge", method="merge-cka", experts=7).layers.values():
        assert merged.experts[OF] == merged.experts[COPY]
    rule = case.checkpoint.family.routing_of(case.checkpoint.config)
    pairs = rule.groups > 1 and rule.group_best == 2
    for dropped in case.prune(tmp_path / "drop", method="drop-reap", experts=7).layers.values():
        if pairs:
            assert len(kept(dropped)) == 6
        else:
            assert kept(dropped) == [e for e in range(8) if e != DEAD]


def test_native_loads_in_transformers(case: Case, tmp_path: Path) -> None:
    """Every expert narrower, or whole experts gone, in a stock layout: the same logits.

    Where an expert loses neurons, the one without output is among them.
    Among groups dropping is refused: groups are runs of equal length and would be others.
    """
    ids = torch.randint(1, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    grouped = case.checkpoint.family.routing_of(case.checkpoint.config).groups > 1
    for method in ("block-obs", "drop-reap"):
        out = tmp_path / method
        if grouped and method == "drop-reap":
            with pytest.raises(PlanError, match="groups of experts"):
                case.prune(out, form="native", method=method)
            continue
        for layer in case.prune(out, method=method, uniform=True).layers.values():
            assert method != "block-obs" or NEURON not in neurons(layer, DULL) or layer.width == 64
        export(out, tmp_path / f"{method}-native", "native", Silent())
        native = open_checkpoint(tmp_path / f"{method}-native")
        for key in native.family.width_copies:
            assert native.config[key] == native.shape.width
        assert native.expert_bytes() == open_checkpoint(out).expert_bytes()
        stock = reference_logits(native.path, ids, {})
        torch.testing.assert_close(our_logits(out, ids), stock, rtol=1e-4, atol=1e-4)
