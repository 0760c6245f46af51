"""The split in an HTTPRoute, by the official client, against an API server with faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from moe_serve.errors import OutputError, Overtaken, RolloutError
from moe_serve.serving import httproute
from moe_serve.serving.httproute import HttpRoute
from moe_serve.serving.routes import new_split
from tests.support.cluster import Cluster, deployed

ROUTE: Final = HttpRoute(
    namespace="moe-serve", name="openai", original="original", pruned="pruned", pruned_port=8000
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """With the route that is in ``deploy/``; nothing is slow but what is made so."""
    with deployed(tmp_path, monkeypatch) as found:
        yield found


def test_a_split_is_written_and_read_back(cluster: Cluster) -> None:
    """Weights of the rule that names both; rules for those who ask for a variant stay."""
    split = new_split(25.0, shadow=5.0, sticky=())
    ROUTE.put(split)
    assert cluster.weights() == [[1], [1], [7500, 2500]]
    assert ROUTE.read() == split
    assert cluster.route is not None
    filters = cluster.route["spec"]["rules"][2]["filters"]
    assert [f["requestMirror"]["fraction"] for f in filters] == [
        {"numerator": 500, "denominator": 10_000}
    ]
    ROUTE.put(new_split(0.0))
    assert "filters" not in cluster.route["spec"]["rules"][2]


def test_it_is_in_force_when_the_gateway_says_so(cluster: Cluster) -> None:
    """Not before it has seen the present generation, and not where it refuses."""
    split = new_split(25.0)
    cluster.accepts = False
    ROUTE.put(split)
    assert ROUTE.in_force() is None
    cluster.gateway()
    assert ROUTE.in_force() is None
    with pytest.raises(RolloutError, match="no gateway has accepted the new weights"):
        ROUTE.confirm(split.version, timeout=0.0)
    cluster.accepts = True
    cluster.gateway()
    ROUTE.confirm(split.version)


def test_a_conflict_is_read_again_and_loses_nothing(cluster: Cluster) -> None:
    """Twice another client was faster: its labels stay, and the weights are ours."""
    cluster.faults = ["conflict", "conflict"]
    ROUTE.put(new_split(25.0), over=ROUTE.read())
    assert cluster.weights()[2] == [7500, 2500]
    assert cluster.route is not None
    assert cluster.route["metadata"]["labels"] == {"seen-1": "1", "seen-2": "1"}
    assert cluster.writes == 3


def test_weights_changed_in_between_are_not_overwritten(cluster: Cluster) -> None:
    """A step that was decided over other weights is refused; a rollback is not."""
    over = ROUTE.read()
    cluster.reweigh(6000, 4000)
    with pytest.raises(Overtaken, match="someone else changed the weights"):
        ROUTE.put(new_split(25.0), over=over)
    assert cluster.weights()[2] == [6000, 4000]
    ROUTE.put(new_split(0.0))
    assert cluster.weights()[2] == [10_000, 0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "service account's token"),
        ("403", "gives the right"),
        ("404", "apply it again"),
        ("422", "v1.3 or newer"),
    ],
)
def test_a_no_is_final_and_says_what_to_do(cluster: Cluster, fault: str, words: str) -> None:
    """One attempt; the weights stay."""
    cluster.faults = [fault] * 5
    with pytest.raises(OutputError, match=words):
        ROUTE.put(new_split(25.0))
    assert (cluster.writes, cluster.weights()[2]) == (1, [10_000, 0])


def test_a_route_that_was_deleted_is_said(cluster: Cluster) -> None:
    """Reading and writing."""
    cluster.route = None
    with pytest.raises(RolloutError, match="is not there"):
        ROUTE.read()
    with pytest.raises(OutputError, match="is not there"):
        ROUTE.put(new_split(0.0))


@pytest.mark.parametrize("fault", ["hang", "503", "429"])
def test_a_server_that_does_not_answer_once_is_asked_again(
    cluster: Cluster, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later attempt gets through."""
    monkeypatch.setattr(httproute, "_PATIENCE", (60.0, 1.0 if fault == "hang" else 60.0))
    cluster.faults = [fault]
    ROUTE.put(new_split(25.0))
    assert cluster.faults == []
    assert cluster.weights()[2] == [7500, 2500]


def test_an_answer_that_got_lost_is_not_a_second_write(cluster: Cluster) -> None:
    """It is looked up by the version that the first one wrote."""
    cluster.faults = ["lost"]
    ROUTE.put(new_split(25.0))
    assert (cluster.writes, cluster.weights()[2]) == (1, [7500, 2500])


def test_a_server_that_is_gone_leaves_the_weights(cluster: Cluster) -> None:
    """After some attempts it is said, with what traffic does meanwhile."""
    cluster.down = True
    with pytest.raises(OutputError, match="goes on with the weights it has"):
        ROUTE.put(new_split(0.0))


def test_an_old_gateway_api_copies_nothing_rather_than_all(cluster: Cluster) -> None:
    """It drops the fraction from what is written, which would copy every request."""
    cluster.old = True
    with pytest.raises(OutputError, match="nothing is copied now"):
        ROUTE.put(new_split(0.0, shadow=5.0))
    assert ROUTE.read().shadow == 0


@pytest.mark.parametrize("change", ["third", "none", "unlike"])
def test_what_is_no_split_is_said(cluster: Cluster, change: str) -> None:
    """A third backend, no rule with both, two rules that differ."""
    assert cluster.route is not None
    rules: list[dict[str, Any]] = cluster.route["spec"]["rules"]
    if change == "third":
        rules[2]["backendRefs"].append({"name": "other", "port": 1})
    elif change == "none":
        rules[2]["backendRefs"].pop()
    else:
        backends = [{**b, "weight": 1} for b in rules[2]["backendRefs"]]
        rules.append({"backendRefs": backends})
    with pytest.raises(RolloutError, match="is no split between original and pruned"):
        ROUTE.read()
    if change == "none":
        with pytest.raises(OutputError, match="no rule leads to both"):
            ROUTE.put(new_split(0.0))
    else:
        ROUTE.put(new_split(0.0))
        assert {tuple(w[:2]) for w in cluster.weights() if len(w) > 1} == {(10_000, 0)}
