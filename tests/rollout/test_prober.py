"""Probes under the loop: what they stop, what they open, and what they must not disturb."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_serve.errors import RolloutError
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.margins import LatencyGuard, QualityGuard
from moe_serve.rollout.policy import Probes, Step
from moe_serve.rollout.prober import prober_of
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import status
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied
from tests.support.rollouts import POLICY, QUICK, ask, begun, phase


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxied]:
    """Envoy and two upstreams that answer at once."""
    with proxied(tmp_path, chunks=1, pause=0.0) as running:
        yield running


PROBED = POLICY.model_copy(
    update={
        "steps": (Step(weight=0.0, min_seconds=0.0), Step(weight=50, **QUICK)),
        "guards": POLICY.guards.model_copy(
            update={"quality": QualityGuard(), "ttft": LatencyGuard(objective=1.0, margin=0.4)}
        ),
        "probes": Probes(interval_seconds=0.05),
        "blind_seconds": 60.0,
    }
)


def test_probes_pass_no_proxy(proxy: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their texts are a company's own: they go to the engines and nowhere else."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    prober = prober_of(PROBED, StackState.load(proxy.state), print, None)
    prober.step()
    assert prober.quality().trouble == ""


def until(proxy: Proxied, controller: Controller, wanted: str) -> None:
    """Tick until that phase, without any request of a user."""
    end = time.monotonic() + 30
    while phase(proxy)[0] != wanted:
        assert time.monotonic() < end, status(proxy.state)["decision"]
        controller.tick()
        time.sleep(0.05)


def test_a_ruined_model_is_rolled_back_before_any_user_meets_it(proxy: Proxied) -> None:
    """Probes alone tell; the record says so in figures and without a word of their texts."""
    proxy.pruned.unlike = 4.0
    with begun(proxy, PROBED) as controller:
        until(proxy, controller, "rolled_back")
        last = Store(proxy.state).history()[0]
        assert (last.actor, last.decision, last.percent_before) == ("controller", "rollback", 0)
        assert last.reason.startswith("quality-")
        assert last.confirmed_at is not None
        told = "".join(p.read_bytes().decode(errors="ignore") for p in proxy.state.glob("*.sq*"))
        assert controller.tick() is None
        assert controller._prober is None
    assert str(proxy.pruned.asked[0]["prompt"])[:20] not in told
    assert proxy.pruned.asked[0]["priority"] == 1000


def test_good_probes_open_the_way_and_are_not_counted_as_users(proxy: Proxied) -> None:
    """Most of 35 asked; forty users' requests later each engine's counts are those forty."""
    with begun(proxy, PROBED) as controller:
        until(proxy, controller, "canary")
        prober = controller._prober
        assert prober is not None
        assert len(prober.quality().results) > 25
        controller.tick()
        ask(proxy, 40)
        prober.stop()
        prober._thread.join(10)
        controller.tick()
        window = controller._window
        assert window is not None
        assert sum(n for _, n in window.shares["truncated"].values()) == 40
        assert sum(n for _, n in window.failures.values()) == 40


def test_results_survive_a_controller_and_a_changed_set_is_not_asked(proxy: Proxied) -> None:
    """The next one goes on; with another file than the rollout began with it says so and waits."""
    texts = proxy.state / "mine.jsonl"
    texts.write_text('{"text": "one text"}\n{"text": "another text"}\n')
    own = PROBED.probes.model_copy(update={"texts": texts, "default": False})
    with begun(proxy, PROBED.model_copy(update={"probes": own})) as controller:
        until(proxy, controller, "canary")
        controller.tick()
        controller._ask_no_more()
        Store(proxy.state).release(controller._holder)
        second = Controller(proxy.state, lambda _: None)
        second.tick()
        assert second._prober is not None
        assert len(second._prober.quality().results) == 2
        second._ask_no_more()
        texts.write_text('{"text": "something else"}\n')
        decision = second.tick()
        assert decision is not None
        kl = next(e for e in decision.evidence if e.guard == "quality-kl")
        assert (kl.verdict, "not those that the rollout began with" in kl.needs) == ("open", True)


def test_probes_give_way_while_requests_wait(proxy: Proxied) -> None:
    """Nine times out of ten; and an engine that does not answer is told in a line without text."""
    told: list[str] = []
    prober = prober_of(PROBED, StackState.load(proxy.state), told.append, None)
    prober.crowded({ORIGINAL: 3.0, PRUNED: 0.0})
    for _ in range(10):
        prober.step()
    assert len(prober.quality().results) == 1
    proxy.pruned.stop()
    prober.crowded({ORIGINAL: 0.0, PRUNED: 0.0})
    with pytest.raises(RolloutError, match=r"pruned engine: no answer to a probe \(ConnectError\)"):
        prober.step()


def test_an_engine_that_hangs_is_rolled_back_by_what_it_does_not_say(proxy: Proxied) -> None:
    """It accepts scrapes and probes and answers none: blind, then back; nothing waits for it."""
    with begun(proxy, PROBED.model_copy(update={"blind_seconds": 2.0})) as controller:
        proxy.pruned.hang()
        decisions = []
        for _ in range(20):
            decision = controller.tick()
            assert decision is not None
            decisions.append((decision.kind, decision.reason))
            if decision.kind != "hold":
                break
        assert decisions[0] == ("hold", "blind")
        assert decisions[-1] in (("rollback", "blind"), ("rollback", "hard"))
        assert Store(proxy.state).history()[0].confirmed_at is not None
