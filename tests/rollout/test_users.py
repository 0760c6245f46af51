"""Users told apart: what the proxy writes, what is summed, what it is worth as evidence."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import httpx
import pytest

from moe_serve.rollout.guards import effect, errors, split_mismatch
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.reading import Reading
from moe_serve.rollout.simulation import play
from moe_serve.rollout.traffic import move
from moe_serve.rollout.users import Users
from moe_serve.rollout.window import Window
from moe_serve.rollout.workload import Scenario
from moe_serve.serving import listener
from moe_serve.serving.listener import listener_file, trim_users, users_file
from moe_serve.serving.routes import STICKY
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import proxied
from tests.support.readings import PLAIN, UNPROBED, Traffic

BODY = {"model": "m", "prompt": "x"}


def test_the_proxy_tells_users_apart_and_names_none(tmp_path: Path) -> None:
    """By header and by cookie; what is pinned, of nobody known or no question not at all.

    Six requests of one user and two of another, all answered by the same: 6² + 2² = 40.
    """
    with proxied(tmp_path, chunks=1) as proxy:
        move(tmp_path, 100, decision="set", reason="")
        url = f"{proxy.endpoint}/completions"
        cookie = {"cookie": f"other=1; {STICKY[1].partition(':')[2]}=ada"}
        for headers in (*[{"x-user-id": "ada@example.com"}] * 6, *[cookie] * 2, {}):
            assert httpx.post(url, json=BODY, headers=headers).status_code == 200
        models = httpx.get(f"{proxy.endpoint}/models", headers={"x-user-id": "ada@example.com"})
        assert models.status_code == 200
        pinned = {"x-moe-serve-variant": "original", "x-user-id": "eve"}
        assert httpx.post(url, json=BODY, headers=pinned).status_code == 200
        users, until = Users(path=users_file(tmp_path)), time.monotonic() + 60
        while (found := users.since(0.0))[PRUNED][0] < 8:
            assert time.monotonic() < until, users_file(tmp_path).read_text()
            time.sleep(0.05)
    assert found == {ORIGINAL: [0, 0], PRUNED: [8, 40]}
    text = users_file(tmp_path).read_text()
    salt = listener_file(tmp_path).with_name("users.salt")
    salted = salt.read_bytes() + b"ada@example.com"
    assert hashlib.sha256(salted).hexdigest()[:16] in text
    assert hashlib.sha256(b"ada@example.com").hexdigest()[:16] not in text
    assert "ada" not in text
    modes = {file.stat().st_mode & 0o777 for file in (users_file(tmp_path), salt)}
    assert modes == {0o600}


def line(at: int, user: int, variant: str = PRUNED) -> str:
    """As the proxy writes it."""
    return f"{at} {hashlib.sha256(str(user).encode()).hexdigest()[:16]} {variant} 200 - 12\n"


def test_the_file_is_read_on_and_may_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line waits for its rest; older lines and what is no line do not count."""
    file = users_file(tmp_path)
    file.parent.mkdir()
    users = Users(path=file)
    assert users.since(100.0)[PRUNED] == [0, 0]
    file.write_text(
        line(99, 1) + line(100, 1) + line(100, 2, ORIGINAL) + "- - -\n" + line(101, 1)[:9]
    )
    assert users.since(100.0) == {PRUNED: [1, 1], ORIGINAL: [1, 1]}
    with file.open("a") as more:
        more.write(line(101, 1)[9:] + line(102, 3))
    assert users.since(100.0)[PRUNED] == [3, 2**2 + 1]
    monkeypatch.setattr(listener, "_MOST_USERS_BYTES", 10)
    trim_users(tmp_path)
    assert file.stat().st_size == 0
    with file.open("a") as more:
        more.write(line(103, 1))
    assert users.since(100.0)[PRUNED] == [4, 3**2 + 1]
    assert users.since(103.0)[PRUNED] == [1, 1]


def test_more_users_than_are_held_are_sampled(tmp_path: Path) -> None:
    """Of 2,000 with three requests each some 200 are held: both sums within a tenth or two."""
    file = users_file(tmp_path)
    file.parent.mkdir()
    odd = "1 not-hexadecimal! pruned 200 - 1\n1\u0661 0123456789abcdef pruned 200 - 1\n\0\0\n"
    file.write_text(odd + "".join(line(1, user) for user in range(2000)) * 3)
    users = Users(path=file, most=250)
    requests, squares = users.since(0.0)[PRUNED]
    assert squares == 3 * requests
    assert requests == pytest.approx(6000, rel=0.2)
    assert len(users._requests) <= 250


def test_failures_of_one_user_are_known(tmp_path: Path) -> None:
    """Three of one and two of another since a moment, on pruned; older ones do not count."""
    file = users_file(tmp_path)
    file.parent.mkdir()
    failed = [line(at, user).replace("200 -", "503 UF") for at, user in ((9, 1), (20, 1), (21, 1))]
    failed += [line(22, user).replace("200 -", "200 UC") for user in (1, 2, 2)]
    failed += [line(22, 2, ORIGINAL).replace("200", "500")] * 9 + [line(23, 3)] * 9
    file.write_text("".join(failed))
    users = Users(path=file)
    users.since(0.0)
    assert (users.worst(PRUNED, 0.0), users.worst(PRUNED, 10.0)) == (4, 3)
    assert users.worst(PRUNED, 22.0) == 2
    assert users.worst(PRUNED, 30.0) == 0


def test_one_users_requests_count_for_less() -> None:
    """40 requests each of 50 users beside 2,000 of nobody known: m = 1 + (80,000 - 2,000) / 4,000.

    At a correlation of a twentieth 1 + 19.5 / 20 = 1.975 requests count as one.
    """
    window = Window(began=0.0, weight=50.0)
    window.failures = {ORIGINAL: [0.0, 4000.0], PRUNED: [0.0, 4000.0]}
    window.crowds[PRUNED] = [2000.0, 50 * 40.0**2]
    assert window.per_user(PRUNED) == pytest.approx(20.5)
    policy = Policy(dependence=0.05)
    assert effect(window, policy, PRUNED) == pytest.approx(1.975)
    assert effect(window, policy, ORIGINAL) == 1.0
    found = errors(window, policy, Step(weight=50.0), explain=False)
    assert "2.0 requests count as one" in found.basis
    window.crowds[PRUNED] = [0.0, 0.0]
    assert errors(window, policy, Step(weight=50.0), explain=False).upper < found.upper


def test_what_was_counted_is_kept_when_less_is_left_to_read() -> None:
    """The file was cut while no controller ran: the next one's smaller sums are not taken."""
    traffic = Traffic(PLAIN)
    for crowds in ({PRUNED: [9.0, 81.0]}, {PRUNED: [2.0, 4.0]}, {}):
        reading = Reading(at=traffic.at, tick=traffic.tick, arms=traffic.arms, crowds=crowds)
        traffic.window.add(reading, PLAIN)
        assert traffic.window.crowds[PRUNED] == [9.0, 81.0]
    again = Window.from_json(traffic.window.to_json())
    assert again is not None
    assert again.crowds == traffic.window.crowds


def test_a_split_by_users_is_checked_by_users() -> None:
    """Ten users of 400 requests each, four on pruned: as requests impossible, as users likely."""
    window = Window(began=0.0, weight=50.0)
    window.failures = {ORIGINAL: [0.0, 2400.0], PRUNED: [0.0, 1600.0]}
    assert split_mismatch(window, Policy())
    window.crowds = {ORIGINAL: [2400.0, 6 * 400.0**2], PRUNED: [1600.0, 4 * 400.0**2]}
    assert not split_mismatch(window, Policy())


def test_clients_who_choose_for_themselves_are_no_regression() -> None:
    """At 1 % of 20 requests a second one more each second asks for pruned by name.

    As many of each side's requests fail, so pruned's share of all failures is no sign of harm.
    """
    window = Window(began=0.0, weight=1.0)
    window.failures = {ORIGINAL: [495.0, 99_000.0], PRUNED: [30.0, 6_000.0]}
    assert errors(window, Policy(), Step(weight=1.0), explain=False).verdict != "harm"
    window.failures[PRUNED][0] = 600.0
    assert errors(window, Policy(), Step(weight=1.0), explain=False).verdict == "harm"


def test_users_who_differ_are_no_regression() -> None:
    """500 users, few on pruned at first, who fail and are cut short more or less than others.

    With every request counted in full some of these rollouts of a healthy variant end as harmful;
    counted by users none does.
    """
    policy = Policy(steps=(Step(weight=1.0, max_seconds=14_400.0),), guards=UNPROBED)
    crowd = Scenario(users=500, alike=0.2)

    def harmed(policy: Policy) -> int:
        return sum(play(policy, crowd, seed).fate == "rolled_back" for seed in range(8))

    assert harmed(policy.model_copy(update={"dependence": 0.0})) > 0
    assert harmed(policy.model_copy(update={"dependence": 0.2})) == 0
