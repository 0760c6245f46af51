"""Whole rollouts against made-up traffic."""

from __future__ import annotations

import pytest

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.simulation import (
    Thresholds,
    play,
    play_thresholds,
    scenarios,
    simulate,
    summarise,
)
from moe_serve.rollout.workload import Scenario

POLICY = Policy()


def test_equal_seeds_give_equal_rollouts() -> None:
    """And others others."""
    first = play(POLICY, Scenario(), 1)
    assert play(POLICY, Scenario(), 1) == first
    assert play(POLICY, Scenario(), 2) != first


@pytest.mark.parametrize("name", [n for n in scenarios(POLICY) if n.startswith("healthy")])
def test_the_healthy_are_promoted(name: str) -> None:
    """Five of five each; the benchmark plays ten thousand."""
    outcomes = [play(POLICY, scenarios(POLICY)[name], seed) for seed in range(5)]
    assert {o.fate for o in outcomes} == {"promoted"}


@pytest.mark.parametrize("name", [n for n in scenarios(POLICY) if not n.startswith("healthy")])
def test_the_harmful_are_rolled_back(name: str) -> None:
    """Twenty of twenty, by proof of harm."""
    outcomes = [play(POLICY, scenarios(POLICY)[name], seed) for seed in range(20)]
    assert {(o.fate, o.reason) for o in outcomes} == {("rolled_back", "harm")}


def test_silence_ends_inconclusive_and_not_in_a_rollback() -> None:
    """Hardly any traffic: after the step's day a person is asked. Fixed thresholds roll back."""
    scenario = Scenario(rate=0.0002, diurnal=0.0, burst_share=0.0)
    ours = play(POLICY, scenario, 0)
    assert (ours.fate, ours.reason) == ("paused", "inconclusive")
    assert play_thresholds(Thresholds(), scenario, 0).fate == "rolled_back"


def test_sums_are_what_they_say() -> None:
    """Shares add to one; a healthy variant harms nobody."""
    ours, fixed = simulate(POLICY, Scenario(), 3, seed=7)
    for name, outcomes in (("policy", ours), ("thresholds", fixed)):
        found = summarise("healthy", name, outcomes)
        total = found.promoted + found.rolled_back + found.paused + found.unfinished
        assert total == pytest.approx(1.0)
        assert found.rollouts == 3
        assert found.harmed == 0.0
        assert found.exposed > 0
