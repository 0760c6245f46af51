"""One GPU for two engines: who sleeps when, with a real Envoy before engines that can sleep."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from moe_serve.demo.clients import Load
from moe_serve.errors import RolloutError, ServingError, UsageError
from moe_serve.rollout.traffic import move
from moe_serve.serving import stack
from moe_serve.serving.config import StackConfig, load_stack_config
from moe_serve.serving.engine import EngineSpec
from moe_serve.serving.routes import read_split, write_split
from moe_serve.serving.sharing import Rest, memory_shares
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied

GIB = 2**30
BODY = {"model": "m", "prompt": "x"}
ASLEEP = ["sleep?level=1&mode=wait"]


@contextmanager
def sharing_one(state: Path) -> Iterator[Proxied]:
    """A stack on a shared GPU."""
    with proxied(state, chunks=3, pause=0.0) as running:
        replace(StackState.load(state), shares_gpu=True).save(state)
        yield running


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One for the module."""
    with sharing_one(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
def shared(one: Proxied) -> Proxied:
    """All traffic on the pruned engine, the original awake and idle."""
    return promoted(one)


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Proxied]:
    """The same for a test that kills an engine."""
    with sharing_one(tmp_path) as running:
        yield promoted(running)


def promoted(proxy: Proxied) -> Proxied:
    """Everything on the pruned engine."""
    proxy.original.turning = lambda _to: None
    move(proxy.state, 0, decision="set", reason="")
    move(proxy.state, 100, decision="promote", reason="")
    proxy.original.running = 0
    proxy.original.told.clear()
    return proxy


def resting(proxy: Proxied) -> Rest:
    """What tends it, without the quiet minute."""
    stack_state = StackState.load(proxy.state)
    return Rest(folder=proxy.state, stack=stack_state, quiet_seconds=0.0)


def asked(proxy: Proxied, **headers: str) -> httpx.Response:
    """One completion."""
    url = f"{proxy.endpoint}/completions"
    return httpx.post(url, json=BODY, headers=headers, timeout=60)


def test_the_original_sleeps_once_it_has_served_nobody_for_a_while(shared: Proxied) -> None:
    """Not before the quiet time is over, nor with a request in flight, and one time only."""
    now = [0.0]
    rest = Rest(
        folder=shared.state,
        stack=StackState.load(shared.state),
        quiet_seconds=60.0,
        clock=lambda: now[0],
    )
    assert rest.tend() is None
    now[0] = 59.0
    assert rest.tend() is None
    now[0], shared.original.running = 60.0, 1
    assert rest.tend() is None
    assert shared.original.told == []
    shared.original.running = 0
    assert "asleep" in str(rest.tend())
    assert rest.tend() is None
    assert shared.original.told == ASLEEP


def test_a_rollback_wakes_first_and_loses_nothing(shared: Proxied) -> None:
    """While the original wakes, the pruned engine still has all traffic."""
    resting(shared).tend()
    seen: list[tuple[str, float]] = []
    shared.original.turning = lambda to: seen.append((to, read_split(shared.state).percent))
    with Load(endpoint=shared.endpoint, model="m", streams=4, tokens=3) as load:
        move(shared.state, 0, decision="rollback", reason="")
        assert asked(shared).headers[HEADER] == ORIGINAL
    assert seen == [("wake_up", 100.0)]
    assert load.failed == 0
    assert not shared.original.sleeping


def test_where_the_original_does_not_wake_the_pruned_engine_goes_on(doomed: Proxied) -> None:
    """The move is refused with the reason; with the pruned engine gone too it is made."""
    resting(doomed).tend()
    doomed.original.refuses_to_wake = True
    with pytest.raises(RolloutError, match=r"did not wake.*out of memory.*goes on serving"):
        move(doomed.state, 0, decision="rollback", reason="")
    assert read_split(doomed.state).percent == 100
    assert asked(doomed).headers[HEADER] == PRUNED
    doomed.pruned.die()
    moved = move(doomed.state, 0, decision="rollback", reason="")
    assert moved.percent == 0
    assert any("did not wake" in warning for warning in moved.warnings)


def test_a_pruned_engine_that_dies_wakes_the_original(doomed: Proxied) -> None:
    """What the proxy gave to the sleeping original meanwhile waits, and is answered."""
    rest = resting(doomed)
    rest.tend()
    assert asked(doomed).headers[HEADER] == PRUNED
    doomed.pruned.die()
    found: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: found.append(asked(doomed)))
    waiting.start()
    assert "awake" in str(rest.tend())
    waiting.join(60)
    assert [(r.status_code, r.headers[HEADER]) for r in found] == [(200, ORIGINAL)]


def test_a_move_while_it_falls_asleep_wakes_it_again(shared: Proxied) -> None:
    """Whoever is second looks again."""

    def roll_back(to: str) -> None:
        if to == "sleep":
            write_split(shared.state, 0)

    shared.original.turning = roll_back
    assert resting(shared).tend() is None
    assert shared.original.told == [*ASLEEP, "wake_up"]


def test_a_file_edited_by_hand_wakes_it(shared: Proxied) -> None:
    """A person wins, by whatever way."""
    rest = resting(shared)
    rest.tend()
    write_split(shared.state, 5)
    assert "awake" in str(rest.tend())


def test_who_asks_for_the_sleeping_original_is_told(shared: Proxied) -> None:
    """At once, where the request would wait for ever; with any share it is served."""
    resting(shared).tend()
    answer = asked(shared, **{HEADER: ORIGINAL})
    assert answer.status_code == 503
    assert "no engine can take this request" in answer.json()["error"]["message"]
    assert read_split(shared.state).resting
    move(shared.state, 50, decision="set", reason="")
    assert asked(shared, **{HEADER: ORIGINAL}).headers[HEADER] == ORIGINAL


def test_nobody_outside_can_put_an_engine_to_sleep(shared: Proxied) -> None:
    """The development endpoints are not reachable at the public port, by whatever verb."""
    base = shared.endpoint.removesuffix("/v1")
    for path in ("/sleep", "/wake_up", "/is_sleeping", "/v1/../sleep", "//sleep"):
        assert httpx.post(f"{base}{path}", headers={HEADER: ORIGINAL}).status_code == 404
        assert httpx.get(f"{base}{path}", headers={HEADER: PRUNED}).status_code == 404
    assert shared.original.told == shared.pruned.told == []


def test_both_fit_awake() -> None:
    """0.9 · 80 - 40 - 20 = 12 GiB are left, 6 for each: 46 / 80 and 26 / 80."""
    shares = memory_shares(80 * GIB, {ORIGINAL: 40 * GIB, PRUNED: 20 * GIB})
    assert shares == pytest.approx({ORIGINAL: 0.575, PRUNED: 0.325})
    with pytest.raises(UsageError, match=r"69.0 GiB of weights leave 3.0 GiB"):
        memory_shares(80 * GIB, {ORIGINAL: 46 * GIB, PRUNED: 23 * GIB})


def test_only_the_original_can_sleep(tmp_path: Path) -> None:
    """By vLLM's option."""
    (tmp_path / "config.json").write_text("{}")
    spec = EngineSpec(variant=ORIGINAL, model=tmp_path, served_model="m", port=1, log=tmp_path)
    assert "--enable-sleep-mode" not in spec.command(gpu=True)
    assert "--enable-sleep-mode" in replace(spec, sleeps=True).command(gpu=True)


def test_without_a_gpu_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started; as are several GPUs and engines elsewhere."""
    monkeypatch.setattr(stack, "read_gpus", lambda: iter(()))
    config = StackConfig(original=tmp_path, pruned=tmp_path, state=tmp_path, share_gpu=True)
    with pytest.raises(ServingError, match="--share-gpu: vLLM's sleep mode"):
        stack.bring_up(config, lambda _text: None)
    given = {"original": tmp_path, "pruned": tmp_path, "share_gpu": True}
    with pytest.raises(UsageError, match="for engines that are started here"):
        load_stack_config(None, given | {"original_url": "http://127.0.0.1:1"})
    with pytest.raises(UsageError, match="share_gpu is for one GPU"):
        load_stack_config(None, given | {"engine_args": ("--tensor-parallel-size=2",)})
