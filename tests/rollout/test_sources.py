"""Readings from engines, proxy and Prometheus: counters as they are, and absence as absence."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest

from moe_serve.metrics.sources import EngineCounts, Host
from moe_serve.rollout.policy import Policy, Prometheus
from moe_serve.rollout.sources import (
    DirectSources,
    PrometheusSources,
    _abandoned,
    _requests,
    over_edge,
    sources_of,
)
from moe_serve.rollout.traffic import move
from moe_serve.rollout.users import Users, lines
from moe_serve.serving.listener import users_file
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import HEADER as VARIANT
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import proxied
from tests.support.stacks import fake_stack

POLICY = Policy()
COUNTS = [("0.1", 2.0), ("0.75", 5.0), ("1.0", 7.0), ("2.5", 9.0), ("+Inf", 10.0)]


@pytest.mark.parametrize(
    ("objective", "edge", "over"), [(1.0, 1.0, 3.0), (0.8, 0.75, 5.0), (50.0, 2.5, 1.0)]
)
def test_the_nearest_edge_stands_for_the_objective(
    objective: float, edge: float, over: float
) -> None:
    """0.8 is nearer to 0.75 than to 1.0: 10 - 5 requests were slower."""
    assert over_edge(COUNTS, objective) == ((over, 10.0), edge)


@pytest.mark.parametrize("counts", [[], [("+Inf", 3.0)], [("1.0", 3.0)]])
def test_a_histogram_without_edges_or_total_is_none(counts: list[tuple[str, float]]) -> None:
    """Not zero."""
    assert over_edge(counts, 1.0) is None


def test_a_request_fails_once() -> None:
    """Two resets before the headers are failed and cut; three streams cut are cut and answered."""
    resets = Host(answered=0, failed=2, cut=2, abandoned=0, sent=2, healthy=True)
    assert _requests(resets) == (2, 2)
    streams = Host(answered=10, failed=0, cut=3, abandoned=0, sent=10, healthy=True)
    assert _requests(streams) == (10, 3)


def test_a_stack_that_is_gone_is_not_zero(tmp_path: Path) -> None:
    """Every counter is unknown."""
    fake_stack(tmp_path)
    found = DirectSources(StackState.load(tmp_path)).read(POLICY)
    for arm in found.arms.values():
        assert (arm.requests, arm.failed, dict(arm.over), arm.healthy) == (None, None, {}, None)


def test_engines_and_proxy_are_read_directly(tmp_path: Path) -> None:
    """Ten requests on the original, each second one slow; the histogram's edge is named."""
    with proxied(tmp_path, chunks=1, pause=0.0) as proxy:
        proxy.original.slow_every = 2
        for _ in range(10):
            httpx.post(f"{proxy.endpoint}/completions", json={})
        found = sources_of(POLICY, StackState.load(tmp_path)).read(POLICY)
        arm = found.arms[ORIGINAL]
        assert (arm.requests, arm.failed, arm.healthy) == (10, 0, True)
        assert arm.over == {"ttft": (5, 10), "tpot": (5, 10)}
        assert arm.shares == {"truncated": (10, 10), "empty": (0, 10), "abandoned": (0, 10)}
        assert found.arms[PRUNED].requests == 0
        assert found.edges == {"ttft": 1.0, "tpot": 0.1, "empty": 1.0}


def test_clients_that_go_away_are_counted_where_they_were(tmp_path: Path) -> None:
    """One in the middle of its stream, one before it began; three stay to the end.

    All are of one user, also those who never saw a header.
    """
    with proxied(tmp_path, chunks=20, pause=0.05) as proxy:
        move(tmp_path, 100, decision="set", reason="")
        url, ada = f"{proxy.endpoint}/completions", {"x-user-id": "ada"}
        for _ in range(3):
            httpx.post(url, json={}, headers=ada)
        with httpx.stream("POST", url, json={}, headers=ada) as stream:
            next(stream.iter_raw())
        proxy.pruned.hang(healthy=True)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={}, headers=ada, timeout=0.5)
        sources = DirectSources(StackState.load(tmp_path))
        until = time.monotonic() + 5.0
        while (found := sources.read(POLICY).arms[PRUNED]).shares["abandoned"][0] < 2:
            assert time.monotonic() < until, found
            time.sleep(0.05)
        assert found.shares["abandoned"] == (2, 5)
        # The one whose stream had begun was answered; nothing has failed.
        assert (found.requests, found.failed) == (4, 0)
        assert sources.read(POLICY).arms[ORIGINAL].shares["abandoned"] == (0, 0)
        users = Users(path=users_file(tmp_path))
        while users.since(0.0)[PRUNED] != [5, 25]:
            assert time.monotonic() < until + 60, users_file(tmp_path).read_text()
            time.sleep(0.05)
    noted = list(lines(users_file(tmp_path).read_bytes()))
    assert [line.left for line in noted] == [False] * 3 + [True] * 2
    assert not any(line.failed for line in noted)


def test_a_gateway_does_not_tell_who_went_away(tmp_path: Path) -> None:
    """Unknown, and not zero; what it does tell is exported alone."""
    with proxied(tmp_path, chunks=1, pause=0.0) as proxy:
        httpx.post(f"{proxy.endpoint}/completions", json={}, headers={VARIANT: PRUNED})
        urls = {name: e.url for name, e in StackState.load(tmp_path).engines.items()}
        found = EngineCounts(urls).read()
    assert found is not None
    assert found[PRUNED].outcomes() == {"answered": 1, "failed": 0, "cut": 0, "sent": 1}
    assert _abandoned(found[PRUNED]) == {}


def prometheus(age: float) -> httpx.Client:
    """A server that knows the pruned variant; its samples are ``age`` seconds old."""

    def answer(request: httpx.Request) -> httpx.Response:
        query = request.url.params["query"]
        assert 'namespace="prod"' in query
        rows: list[tuple[dict[str, str], str]] = []
        if 'variant="pruned"' in query:
            if "_bucket" in query:
                rows = [({"le": "+Inf"}, "8"), ({"le": "0.1"}, "4"), ({"le": "1"}, "6")]
            elif "finished_reason" in query:
                ends = {"length": "3", "stop": "5", "abort": "9"}
                rows = [({"finished_reason": name}, count) for name, count in ends.items()]
            elif query.startswith("time()"):
                rows = [({}, str(age))]
            elif query.startswith("moe_serve_requests_total"):
                counts = {"answered": "9", "failed": "1", "abandoned": "2", "sent": "11"}
                rows = [({"outcome": outcome}, count) for outcome, count in counts.items()]
            elif re.match(r"vllm:num_requests_running|process_start_time", query):
                rows = [({"instance": name}, n) for name, n in (("a", "3"), ("b", "4"))]
        result = [{"metric": labels, "value": [0, value]} for labels, value in rows]
        body = {"status": "success", "data": {"resultType": "vector", "result": result}}
        return httpx.Response(200, json=body)

    return httpx.Client(transport=httpx.MockTransport(answer))


def test_prometheus_gives_the_same_reading() -> None:
    """Sums by variant; what it has no series of stays unknown."""
    settings = Prometheus(prometheus="http://p:9090", selector='namespace="prod"')
    found = PrometheusSources(settings, prometheus(5.0)).read(POLICY)
    arm = found.arms[PRUNED]
    assert (arm.requests, arm.failed, arm.running, arm.waiting) == (10, 1, 3.5, None)
    assert arm.engines == {"instance=a": 3.0, "instance=b": 4.0}
    assert arm.parts > arm.engines.keys()
    assert arm.over == {"ttft": (2, 8), "tpot": (4, 8)}
    # Cut short: 3 of 3 + 5; of one token at most: 6 of 8.
    assert arm.shares == {"truncated": (3, 8), "empty": (6, 8), "abandoned": (2, 11)}
    assert found.arms[ORIGINAL].requests is None


def test_old_samples_are_no_reading() -> None:
    """A scrape that stopped repeats its last value for five minutes; after one it is unknown."""
    settings = Prometheus(prometheus="http://p:9090", selector='namespace="prod"')
    arm = PrometheusSources(settings, prometheus(61.0)).read(POLICY).arms[PRUNED]
    assert arm.requests is None


def test_a_server_that_does_not_answer_is_no_reading() -> None:
    """An error page, or nothing."""
    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(503)))
    found = PrometheusSources(Prometheus(prometheus="http://p:9090"), client).read(POLICY)
    assert {arm.requests for arm in found.arms.values()} == {None}


def test_a_server_that_hangs_is_asked_once_a_reading() -> None:
    """Not twenty times five seconds; at the next reading it is asked again."""
    asked: list[str] = []

    def hang(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        raise httpx.ReadTimeout("", request=request)

    client = httpx.Client(transport=httpx.MockTransport(hang))
    sources = PrometheusSources(Prometheus(prometheus="http://p:9090"), client)
    for number in (1, 2):
        assert {arm.requests for arm in sources.read(POLICY).arms.values()} == {None}
        assert len(asked) == number
