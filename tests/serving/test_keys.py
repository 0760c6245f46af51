"""API keys through the real Envoy and the real ``openai`` client."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from moe_serve.cli.keys import keys as command
from moe_serve.errors import RolloutError, UsageError
from moe_serve.rollout.policy import Sticky
from moe_serve.rollout.traffic import move
from moe_serve.serving import keys as module
from moe_serve.serving.envoy import Admin
from moe_serve.serving.keys import FILE, KEY_HEADER, load_keys, new_key, remove_key
from moe_serve.serving.listener import Edge, listener_file, put_listener
from moe_serve.serving.locks import hold_stack
from moe_serve.serving.routes import STICKY
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied
from tests.support.stacks import fake_stack

BODY = {"model": "m", "prompt": "x"}
RUN = CliRunner()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """An Envoy that knows one key, with an access log."""
    state = tmp_path_factory.mktemp("state")
    with proxied(state, chunks=1, pause=0.0, access_log=str(state / "access.log")) as running:
        yield running


def add(proxy: Proxied, name: str, *options: str) -> str:
    """A key by the command."""
    done = RUN.invoke(command, ["add", name, "--state", str(proxy.state), *options])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def ask(proxy: Proxied, key: str, **headers: str) -> httpx.Response:
    """One completion."""
    sent = {"authorization": f"Bearer {key}", **headers} if key else headers
    return httpx.post(f"{proxy.endpoint}/completions", json=BODY, headers=sent)


def lines_of(proxy: Proxied, key: str) -> list[dict[str, object]]:
    """The access log's lines of a key; Envoy writes one after its client has the answer."""
    end = time.monotonic() + 60
    while True:
        proxy.admin.request("POST", "/reopen_logs")
        lines = [json.loads(line) for line in (proxy.state / "access.log").read_text().splitlines()]
        if found := [line for line in lines if line["key"] == key]:
            return found
        assert time.monotonic() < end, lines
        time.sleep(0.05)


def test_the_first_key_closes_the_door(proxy: Proxied) -> None:
    """Open without keys; with one, OpenAI's client is told what it understands."""
    assert ask(proxy, "").status_code == 200
    key = add(proxy, "team-a")
    for wrong in ("", "x", key[:-1], key + "x", "é" * 10, "a" * 5000):
        headers = {b"authorization": f"Bearer {wrong}".encode()} if wrong else {}
        answer = httpx.post(f"{proxy.endpoint}/completions", json=BODY, headers=headers)
        assert answer.status_code == 401
    assert ask(proxy, key).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="unknown API key"):
        openai.OpenAI(base_url=proxy.endpoint, api_key="no", max_retries=0).models.list()
    good = openai.OpenAI(base_url=proxy.endpoint, api_key=key, max_retries=0)
    assert [model.id for model in good.models.list()] == [ORIGINAL]
    # Load balancers in front have no key.
    assert httpx.get(proxy.endpoint.removesuffix("/v1") + "/health").status_code == 200


def test_the_engine_never_sees_a_key(proxy: Proxied) -> None:
    """What it gets is the key's name, by the proxy's word and not the client's."""
    key = add(proxy, "seen")
    ask(proxy, key, **{KEY_HEADER: "somebody-else"})
    assert "authorization" not in proxy.original.headers
    assert proxy.original.headers[KEY_HEADER] == "seen"


def test_a_key_has_its_variant_or_may_not_choose(proxy: Proxied) -> None:
    """Bound, free, and held to the split, which sends everything to the original."""
    move(proxy.state, 0, decision="set", reason="")
    wish = {HEADER: PRUNED}
    assert ask(proxy, add(proxy, "free"), **wish).headers[HEADER] == PRUNED
    assert ask(proxy, add(proxy, "held", "--no-pin"), **wish).headers[HEADER] == ORIGINAL
    bound = add(proxy, "bound", "--variant", "pruned", "--no-pin")
    assert ask(proxy, bound, **{HEADER: ORIGINAL}).headers[HEADER] == PRUNED


def test_each_key_has_its_own_limit(proxy: Proxied) -> None:
    """Three a minute: the fourth is refused in the clients' shape; another key is not."""
    few = add(proxy, "few", "--requests-per-minute", "3")
    codes = [ask(proxy, few).status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    assert "more requests" in ask(proxy, few).json()["error"]["message"]
    assert ask(proxy, add(proxy, "many")).status_code == 200


def test_a_key_keeps_its_variant(proxy: Proxied) -> None:
    """Sticky by key: twelve keys, each always answered by the same; at half, both answer some."""
    move(proxy.state, 50, decision="set", reason="", sticky=Sticky(key=True).ways)
    found: list[str] = []
    for number in range(12):
        key = add(proxy, f"user-{number}")
        answers = {ask(proxy, key).headers[HEADER] for _ in range(4)}
        assert len(answers) == 1
        found += answers
    assert set(found) == {ORIGINAL, PRUNED}
    move(proxy.state, 0, decision="set", reason="", sticky=STICKY)


def test_a_removed_key_is_refused_and_streams_go_on(tmp_path: Path) -> None:
    """The stream that runs ends as it should; the last key's removal opens nothing."""
    with proxied(tmp_path, chunks=20, pause=0.05) as proxy:
        key = add(proxy, "gone")
        headers = {"authorization": f"Bearer {key}"}
        url = f"{proxy.endpoint}/completions"
        with httpx.stream("POST", url, json=BODY, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            done = RUN.invoke(command, ["remove", "gone", "--state", str(proxy.state)])
            assert done.exit_code == 0
            assert ask(proxy, key).status_code == 401
            assert ask(proxy, "").status_code == 401
            assert "data: [DONE]" in list(lines)


def test_keys_are_neither_kept_nor_logged(proxy: Proxied) -> None:
    """Only hashes at rest, for the owner alone; the access log names the key and no more."""
    key = add(proxy, "secret")
    secret_path = "?api_key=" + key
    httpx.post(
        f"{proxy.endpoint}/completions{secret_path}",
        json={"prompt": "private words"},
        headers={"authorization": f"Bearer {key}"},
    )
    (line,) = lines_of(proxy, "secret")
    for file in (f for f in proxy.state.rglob("*") if f.is_file()):
        content = file.read_bytes()
        assert key.encode() not in content, file
        assert b"private words" not in content, file
    assert stat.S_IMODE((proxy.state / FILE).stat().st_mode) == 0o600
    assert line["path"] == "/v1/completions"
    assert line["status"] == 200


def test_keys_may_be_changed_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is lost, none comes back, and the listener that was written last has them all."""
    load = module.load_keys

    def slowly(state: Path) -> list[module.Key] | None:
        found = load(state)
        time.sleep(0.05)
        return found

    def change(number: int) -> None:
        if number % 2:
            new_key(tmp_path, f"new-{number}")
        else:
            remove_key(tmp_path, f"old-{number}")
        put_listener(tmp_path, Edge(port=1))

    for number in range(0, 6, 2):
        new_key(tmp_path, f"old-{number}")
    monkeypatch.setattr(module, "load_keys", slowly)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(change, range(6)))
    left = {key.name: key.sha256 for key in load(tmp_path) or ()}
    assert set(left) == {"new-1", "new-3", "new-5"}
    listener = listener_file(tmp_path).read_text()
    assert all(sha256 in listener for sha256 in left.values())
    assert "old-" not in listener


@pytest.mark.parametrize("words", [("add", "b"), ("remove", "a")])
def test_a_change_that_is_not_in_force_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """The proxy does not take it: what is to be kept is saved nonetheless, and a new key told."""
    fake_stack(tmp_path)
    replace(StackState.load(tmp_path), edge=Edge(port=1)).save(tmp_path)
    new_key(tmp_path, "a")
    line = [*words, "--state", str(tmp_path)]

    def silent(*_: object) -> None:
        raise RolloutError("has not taken it")

    with monkeypatch.context() as patch:
        patch.setattr(Admin, "confirm_listener", silent)
        done = RUN.invoke(command, line)
    assert (done.exit_code, "saved; not in force yet" in done.stderr) == (1, True)
    left = {key.name for key in load_keys(tmp_path) or ()}
    assert left == ({"a", "b"} if words[0] == "add" else set())
    assert done.stdout.startswith("ms-") == (words[0] == "add")


def test_without_a_proxy_a_change_is_in_force_with_the_next(tmp_path: Path) -> None:
    """Where none answers, though ``up`` runs, nobody knows."""
    fake_stack(tmp_path)
    replace(StackState.load(tmp_path), edge=Edge(port=1)).save(tmp_path)
    line = ["--state", str(tmp_path)]
    done = RUN.invoke(command, ["add", "a", *line])
    assert (done.exit_code, "no proxy runs" in done.stderr) == (0, True)
    with hold_stack(tmp_path):
        done = RUN.invoke(command, ["remove", "a", *line])
    assert (done.exit_code, "saved; not in force yet" in done.stderr) == (1, True)


@pytest.mark.parametrize("name", ["", "A", "a b", 'x"y', "../x", "a" * 64])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    """They end up in a script and in logs."""
    with pytest.raises(UsageError, match="not a name"):
        new_key(tmp_path, name)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": 'x"} evil', "sha256": "0" * 64},
        {"name": "x", "sha256": '"' * 64},
        {"name": "x", "sha256": "0" * 64, "variant": "other"},
        {"name": "x", "sha256": "0" * 64, "requests_per_minute": -1},
        {"name": "x"},
        "x",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, entry: object) -> None:
    """Nothing of it reaches the proxy's script."""
    (tmp_path / FILE).write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(UsageError, match="not a file of API keys"):
        load_keys(tmp_path)
