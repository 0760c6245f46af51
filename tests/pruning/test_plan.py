"""The plan's file: short, readable, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.errors import PlanError
from moe_serve.files import read_json, write_json
from moe_serve.pruning.plan import (
    Block,
    LayerPlan,
    Part,
    Plan,
    _part_defects,
    copies,
    expanded,
    shortened,
)
from tests.support.models import make_model


def plan(neurons: tuple[int, ...]) -> Plan:
    """One layer of one block."""
    block = Block(parts=(Part(expert=0, neurons=neurons),))
    return Plan(
        model="m",
        fingerprint="f",
        statistics_sha256=None,
        method="block-obs",
        settings={},
        seed=0,
        keep=0.5,
        refit=None,
        layers={3: LayerPlan(width=len(neurons), blocks=(block,), experts=((0,),))},
    )


@given(st.lists(st.integers(0, 2**20 - 1), max_size=60))
def test_neurons_come_back_in_their_order(neurons: list[int]) -> None:
    """Ascending or not, repeated or not."""
    assert list(expanded(shortened(neurons))) == neurons


def test_runs_are_written_as_their_ends() -> None:
    """Two neighbours are a run already; a step down is not."""
    assert shortened((0, 3, 4, 5, 12, 11, 20, 21)) == "0 3-5 12 11 20-21"
    assert shortened(()) == ""


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    """And its hash is that of what it says."""
    made = plan((2, 3, 4, 9))
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert Plan.load(tmp_path / "plan.json").sha256() == made.sha256()
    layer = read_json(tmp_path / "plan.json")["layers"]["3"]
    assert layer["blocks"][0]["parts"][0]["neurons"] == "2-4 9"


@pytest.mark.parametrize(
    "line", ["x", "1-", "-1", "5-3", "1  2", "1,2", "0-1048576", "1-99999999", "\u0663", 7, [1.5]]
)
def test_a_line_that_names_no_neurons_is_refused(line: object, tmp_path: Path) -> None:
    """With the field it stands in."""
    plan((1,)).save(tmp_path / "plan.json")
    content = read_json(tmp_path / "plan.json")
    content["layers"]["3"]["blocks"][0]["parts"][0]["neurons"] = line
    write_json(tmp_path / "plan.json", content)
    with pytest.raises(PlanError, match="neurons"):
        Plan.load(tmp_path / "plan.json")


def test_the_hash_does_not_depend_on_the_order_of_layers() -> None:
    """A file that was written anew says the same."""
    made = plan((1, 2))
    layer = made.layers[3]
    there = made.model_copy(update={"layers": {3: layer, 5: layer}})
    back = made.model_copy(update={"layers": {5: layer, 3: layer}})
    assert there.sha256() == back.sha256() != made.sha256()


def test_blocks_name_what_there_is() -> None:
    """Of 4 experts with 8 neurons each: a fifth expert, a ninth neuron, one neuron short, none."""

    def block(expert: int, *neurons: int) -> Block:
        return Block(parts=(Part(expert=expert, neurons=neurons),))

    sound = (block(0, 0, 1), block(3, 6, 7))
    faulty = (block(4, 0, 1), block(0, 7, 8), block(1, 5), Block(parts=()))
    layer = LayerPlan(width=2, blocks=(*sound, *faulty), experts=((0,), None, None, (1,)))
    assert _part_defects(layer, experts=4, width=8) == [
        "block 2 draws on expert 4",
        "block 3 draws on a neuron beyond 8",
        "block 4 has a part of 1 neurons",
        "block 5 has no parts",
    ]


def test_kept_neurons_are_cut_into_blocks_in_their_own_order() -> None:
    """Five kept, best first, two a block: the last of them has no block to go to."""
    blocks = copies(2, [5, 1, 9, 0, 3], 2)
    assert [block.parts[0].neurons for block in blocks] == [(0, 1), (5, 9)]
    assert {part.expert for block in blocks for part in block.parts} == {2}


def test_constants_stand_where_nothing_would() -> None:
    """An expert that is never selected gets one; the others keep their blocks."""
    (block,) = plan((1, 2)).layers[3].blocks
    layer = LayerPlan(width=2, blocks=(block,), experts=((0,), None, (), (0,)))
    assert layer.table() == LayerTable(width=2, blocks=1, experts=((0,), None, (), (0,)))
    assert layer.replaced() == ()
    constants = layer.with_constants()
    assert constants.experts == ((0,), (), (), (0,))
    assert constants.replaced() == (1, 2)


def test_tokens_go_elsewhere_where_experts_are_gone_or_merged() -> None:
    """Not where they only got smaller, down to nothing."""
    blocks = tuple(copies(0, [0, 1, 2, 3], 2))

    def reroutes(*experts: tuple[int, ...] | None) -> bool:
        return LayerPlan(width=2, blocks=blocks, experts=experts).reroutes

    assert not reroutes((0,), (1,), ())
    assert not reroutes((0, 1), ())
    assert reroutes((0, 1), None)
    assert reroutes((0,), (1, 0))


def test_a_plan_has_to_leave_the_router_enough(tmp_path: Path) -> None:
    """By the routing of the checkpoint it is for; where the plan stands is named."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe"))
    shape = checkpoint.shape
    blocks = tuple(copies(0, list(range(shape.width)), shape.width))
    experts = ((0,), *[None] * (shape.experts - 1))
    layer = LayerPlan(width=shape.width, blocks=blocks, experts=experts)
    made = plan((1,)).model_copy(
        update={"fingerprint": checkpoint.fingerprint(), "layers": {0: layer}}
    )
    with pytest.raises(PlanError, match=f"plan.json.*fewer than top_k={shape.top_k} experts"):
        made.check(checkpoint)
