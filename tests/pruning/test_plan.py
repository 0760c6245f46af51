"""The plan's file: short, readable, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.errors import PlanError
from moe_serve.files import read_json, write_json
from moe_serve.pruning.plan import Block, LayerPlan, Part, Plan, expanded, shortened


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
