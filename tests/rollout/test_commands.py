"""What a person is told where a rollout can't do what was asked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_serve.errors import RolloutError, UsageError
from moe_serve.rollout.commands import pause_rollout, resume_rollout, start_rollout
from moe_serve.rollout.policy import Policy, Probes
from moe_serve.rollout.state import State, begin, roll_back
from moe_serve.rollout.store import Store
from tests.support.readings import PLAIN
from tests.support.stacks import fake_stack


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A stack whose controller has the lease."""
    fake_stack(tmp_path)
    Store(tmp_path).lease("controller", 600.0)
    return tmp_path


def put(state: Path, becomes: State) -> None:
    """As if it had come to that."""
    store = Store(state)
    store.note("test", {}, state=becomes, revision=store.saved().revision)


def test_nothing_goes_on_where_nothing_began(state: Path) -> None:
    """Neither a pause nor an end of one; the record stays as it is."""
    before = Store(state).saved()
    for command in (pause_rollout, resume_rollout):
        with pytest.raises(RolloutError, match=r"no rollout is under way \(it is idle\); .* start"):
            command(state, reason="")
    assert Store(state).saved() == before


def test_a_second_rollout_does_not_begin(state: Path) -> None:
    """While the first is at a step, or paused."""
    put(state, begin(PLAIN, time.time()))
    with pytest.raises(RolloutError, match=r"a rollout is under way \(canary\); .* rollback ends"):
        start_rollout(state, PLAIN, reason="")


def test_a_rollout_that_nobody_watches_does_not_begin(tmp_path: Path) -> None:
    """Its guards would say nothing."""
    fake_stack(tmp_path)
    with pytest.raises(RolloutError, match="no controller watches this stack; start it with"):
        start_rollout(tmp_path, PLAIN, reason="")


def test_a_rollback_is_looked_into_first(state: Path) -> None:
    """Its reason is said, and how long the policy wants one to wait: ten minutes, one gone."""
    policy = PLAIN.model_copy(update={"cooldown_seconds": 600.0})
    put(state, roll_back(begin(policy, 0.0), "too many failures", time.time() - 60.0))
    with pytest.raises(RolloutError, match=r"ago: too many failures; .* wait 9 minutes"):
        start_rollout(state, policy, reason="")


def test_probes_that_changed_since_the_policy_was_written_are_refused(state: Path) -> None:
    """The hash that it names is another one's."""
    policy = Policy(probes=Probes(sha256="0" * 64))
    with pytest.raises(UsageError, match=r"the package's probes: the probes have the hash \w{64}"):
        start_rollout(state, policy, reason="")


def test_a_rollout_without_its_policy_can_only_be_ended(state: Path) -> None:
    """A record that lost it, or never had one."""
    put(state, begin(PLAIN, time.time()))
    with pytest.raises(RolloutError, match=r"no policy to go on with; .* rollback ends it"):
        resume_rollout(state, reason="")
