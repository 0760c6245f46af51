"""The control API against its own OpenAPI, and who may use it."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from starlette.testclient import TestClient

from benchmarks.fixtures import MODEL
from moe_serve.errors import ServingError
from moe_serve.rollout import access
from moe_serve.rollout.access import HEADERS, MAX_BODY, Bound
from moe_serve.rollout.commands import start_rollout
from moe_serve.rollout.control import application
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.policy import Hooks, Policy
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move
from moe_serve.serving.routes import read_split, write_split
from moe_serve.serving.token import make_token, new_session, read_token, session_name, token_file
from moe_serve.serving.variants import PRUNED
from tests.support.control import serving
from tests.support.stacks import fake_stack

BASE = "http://127.0.0.1:8001"
SECRET = "https://user:sesame@example.com/hooks/sesame"  # noqa: S105 - made up


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack whose engines are gone, watched by somebody."""
    folder = tmp_path_factory.mktemp("state")
    fake_stack(folder, MODEL)
    write_split(folder, 0)
    Store(folder).lease("test", 3600.0)
    return folder


@pytest.fixture
def client(state: Path) -> Iterator[TestClient]:
    """Without a token."""
    with TestClient(application(state), base_url=BASE) as found:
        yield found


def bearer(state: Path) -> dict[str, str]:
    """The header that may write."""
    return {"Authorization": f"Bearer {read_token(state)}"}


def test_it_does_what_its_openapi_says(state: Path) -> None:
    """Statuses, types and bodies of valid and invalid requests, with and without the token."""
    app = application(state, Bound(names=("testserver",)))
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
    found = list(schema.get_all_operations())
    operations = [operation.ok() for operation in found if isinstance(operation, Ok)]
    assert len(operations) == 13
    for operation in operations:
        if operation.path == "/api/events":
            continue  # a stream without end; it has tests of its own
        takes = bool(operation.query or operation.body)
        modes = list(GenerationMode) if takes else [GenerationMode.POSITIVE]
        for mode in modes:

            @settings(max_examples=8, deadline=None, database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                case.call_and_validate(headers=bearer(state))

            check()


def test_a_rollout_by_api(state: Path, client: TestClient) -> None:
    """Start, pause, resume, set, promote, roll back; each is on record under its own name."""
    client.headers.update(bearer(state))
    client.post("/api/rollback", json={})

    def told(action: str, **body: object) -> tuple[str, float | None]:
        answer = client.post(f"/api/{action}", json=body)
        assert answer.status_code == 200, answer.text
        moved = answer.json()["moved"]
        return answer.json()["state"], moved and moved["pruned_percent"]

    assert told("start", force=True, reason="friday") == ("shadow", 0.0)
    assert client.post("/api/start", json={}).status_code == 409
    assert told("pause") == ("paused", None)
    assert told("resume") == ("shadow", None)
    assert told("weight", pruned_percent=30) == ("paused", 30.0)
    assert "resume" in client.get("/api/status").json()["actions"]
    assert told("promote") == ("promoted", 100.0)
    assert told("rollback", reason="enough") == ("rolled_back", 0.0)
    assert read_split(state).percent == 0.0
    first = client.get("/api/history", params={"limit": 2}).json()
    assert [c["decision"] for c in first["changes"]] == ["rollback", "promote"]
    assert {c["actor"] for c in first["changes"]} == {"api"}
    older = client.get("/api/history", params={"limit": 2, "before": first["next_before"]}).json()
    assert [c["decision"] for c in older["changes"]] == ["set", "start"]
    status = client.get("/api/status").json()
    assert (status["state"], status["reason"]) == ("rolled_back", "enough (api)")
    assert status["actions"] == ["set", "start", "promote"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic {token}"},
        {"cookie": "{name}={token}"},
        {"cookie": "{name}=99999999999.{token}", "origin": BASE},
        {"cookie": "{name}={session}"},
        {"cookie": "{name}={session}", "origin": "http://127.0.0.1:9999"},
        {"cookie": "{name}={session}", "sec-fetch-site": "same-site"},
        {"authorization": "Bearer {token}", "origin": "https://elsewhere.example"},
        {"authorization": "Bearer {token}", "origin": "null"},
        {"authorization": "Bearer {token}", "host": "rebound.example"},
    ],
)
def test_who_may_not_write(headers: dict[str, str], state: Path, client: TestClient) -> None:
    """Without the token, with an ended or forged session, from another page or a foreign name."""
    token = read_token(state)
    known = {"token": token, "name": session_name(token), "session": new_session(token, 0.0)}
    if "same-site" in str(headers) or "9999" in str(headers):
        known["session"] = new_session(token, 4e9)
    sent = {k: v.format(**known) for k, v in headers.items()}
    before = read_split(state)
    answer = client.post("/api/weight", json={"pruned_percent": 77}, headers=sent)
    assert answer.status_code in (401, 403, 421)
    assert read_split(state) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"variant": "pruned", "good": False}, 204),
        ({"variant": "other", "good": False}, 422),
        ({"variant": "pruned", "good": 1}, 422),
        ({"variant": "pruned"}, 422),
        (["pruned"], 422),
        ({"variant": "pruned", "good": True, "more": ""}, 422),
    ],
)
def test_a_vote_is_counted_or_refused(body: object, status: int, state: Path) -> None:
    """Nothing is converted or left out."""
    votes = Votes()
    client = TestClient(application(state, votes=votes), base_url=BASE)
    assert client.post("/feedback", json=body).status_code == status
    assert votes.totals()[PRUNED, "bad"] == (status == 204)


def test_votes_need_no_token_on_this_machine(state: Path) -> None:
    """Unless another site's page sends them; a flood is told so."""
    votes = Votes(clock=lambda: 0.0)
    client = TestClient(application(state, votes=votes), base_url=BASE)
    vote = {"variant": "pruned", "good": True}
    assert client.post("/feedback", json=vote).status_code == 204
    while votes.add(PRUNED, good=True):
        pass
    assert client.post("/feedback", json=vote).status_code == 429
    sent = {"origin": "https://elsewhere.example"}
    assert client.post("/feedback", json=vote, headers=sent).status_code == 403


def test_a_session_may_write_from_its_own_page(state: Path, client: TestClient) -> None:
    """The cookie holds no token."""
    token = read_token(state)
    session = new_session(token, 4e9)
    assert token not in session
    sent = {"cookie": f"{session_name(token)}={session}", "origin": BASE}
    assert client.post("/api/rollback", json={}, headers=sent).status_code == 200


def test_beyond_loopback_reading_needs_the_token_too(state: Path) -> None:
    """Health and the login do not; names have to be told."""
    bound = Bound(host="0.0.0.0", names=("gpu.example",))  # noqa: S104 - nothing listens
    client = TestClient(application(state, bound), base_url="http://gpu.example")
    for path in ("/api/status", "/metrics", "/api/events", "/engines/pruned/metrics"):
        assert client.get(path).status_code == 401, path
    vote = {"variant": "pruned", "good": True}
    assert client.post("/feedback", json=vote).status_code == 401
    assert client.post("/feedback", json=vote, headers=bearer(state)).status_code == 204
    assert client.get("/healthz").status_code == 200
    assert client.get("/api/status", headers=bearer(state)).status_code == 200
    assert client.get("/healthz", headers={"host": "gpu2.example"}).status_code == 421
    assert client.get("/healthz", headers={"host": "10.1.2.3:8001"}).status_code == 200


def test_large_and_malformed_bodies_are_refused(state: Path, client: TestClient) -> None:
    """Also those that do not say how large they are; every answer carries the strict headers."""
    client.headers.update(bearer(state))
    for body in (b" " * (MAX_BODY + 1), iter([b" " * MAX_BODY, b"{}"])):
        answer = client.post("/api/rollback", content=body)
        assert answer.status_code == 413
        assert all(answer.headers[name] == value for name, value in HEADERS.items())
    for body in (b"{", b"\xff", b"[]", b'{"reason": 1}', b'{"unknown": ""}'):
        answer = client.post(
            "/api/rollback", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (400, 422), body
        assert answer.json()["error"]["message"]


def test_a_body_that_never_ends_is_given_up(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """408 after the time allowed, while others are answered."""
    monkeypatch.setattr(access, "_BODY_SECONDS", 0.3)
    with serving(state) as address, socket.create_connection(_place(address), 10) as slow:
        head = "POST /api/rollback HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        head += f"authorization: {bearer(state)['Authorization']}\r\n\r\n"
        slow.sendall(head.encode() + b'{"reason"')
        assert httpx.get(f"{address}/api/status").status_code == 200
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def _place(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    return str(parts.hostname), int(parts.port or 0)


def test_the_policys_secrets_are_not_told(tmp_path: Path) -> None:
    """A webhook's address may be one; the policy is neither in events nor in full anywhere."""
    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 0)
    store = Store(tmp_path)
    store.lease("test", 60.0)
    start_rollout(
        tmp_path, Policy(hooks=Hooks(webhook=SECRET, command=("curl", SECRET))), reason=""
    )
    client = TestClient(application(tmp_path), base_url=BASE)
    for path in ("policy", "status", "history", "guards"):
        assert "sesame" not in client.get(f"/api/{path}").text
    assert client.get("/api/policy").json()["policy"]["hooks"]["webhook"] == "https://example.com/"


def test_events_bring_what_happens_and_what_was_missed(state: Path) -> None:
    """The status at once; then each line of the log, with an id to go on from."""
    with serving(state) as address, httpx.Client(base_url=address, timeout=10) as client:
        with client.stream("GET", "/api/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.iter_lines()
            assert next(lines) == "event: status"
            timer = threading.Timer(
                0.2, move, (state, 12.0), {"decision": "set", "reason": "look\nhere"}
            )
            timer.start()
            number, entry = "", {}
            for line in lines:
                if line.startswith("id: "):
                    number = line[4:]
                    entry = json.loads(next(lines).removeprefix("data: "))
                    if entry["kind"] == "intended":
                        break
            assert entry["body"]["percent_after"] == 12.0
            timer.join()
        sent = {"last-event-id": str(int(number) - 1)}
        with client.stream("GET", "/api/events", headers=sent) as stream:
            found = next(line for line in stream.iter_lines() if line.startswith("id: "))
            assert found == f"id: {number}"


def test_the_token_is_its_owners(tmp_path: Path) -> None:
    """Made once, mode 600; one that others can read is refused."""
    path = make_token(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = read_token(tmp_path)
    assert make_token(tmp_path) == token_file(tmp_path) == path
    assert read_token(tmp_path) == token
    path.chmod(0o640)
    with pytest.raises(ServingError, match="read by others"):
        read_token(tmp_path)
