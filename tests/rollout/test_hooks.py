"""Telling others."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from moe_serve.rollout import hooks
from moe_serve.rollout.policy import Hooks

EVENT = {"kind": "rollback", "words": "harm"}


class Receiver(HTTPServer):
    """Answers with the statuses given, the last one for ever, and keeps what it got."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self.got: list[tuple[dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
        left = self.server.statuses
        self.send_response(left.pop(0) if len(left) > 1 else left[0])
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Not to the test's output."""


@contextmanager
def receiving(*statuses: int) -> Iterator[tuple[Receiver, str]]:
    """A receiver and its address."""
    with Receiver(list(statuses)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}/sesame"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_PAUSES", (0.01, 0.01))


def told(found: Hooks) -> list[str]:
    """What is said of failures, when all is done."""
    lines: list[str] = []
    for thread in hooks.notify(found, EVENT, lines.append):
        thread.join(30)
        assert not thread.is_alive()
    return lines


def test_signatures_are_those_of_the_standard() -> None:
    """Standard Webhooks 1.0's own example of a key, an id, a time and a body."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = hooks.signature(
        key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", '{"test": 2432232314}'
    )
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_is_not_taken_is_sent_again_under_the_same_id(tmp_path: Path) -> None:
    """Two passing failures; each attempt is signed; the receiver's check passes."""
    key = b"0123456789abcdef"
    secret = tmp_path / "key"
    secret.write_text(f"whsec_{base64.b64encode(key).decode()}\n")
    with receiving(503, 429, 204) as (server, url):
        assert told(Hooks(webhook=url, secret=secret)) == []
    assert len(server.got) == 3
    assert len({headers["webhook-id"] for headers, _ in server.got}) == 1
    for headers, body in server.got:
        assert json.loads(body) == EVENT
        said = hooks.signature(
            key, headers["webhook-id"], headers["webhook-timestamp"], body.decode()
        )
        assert headers["webhook-signature"] == said


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (500, 3), (302, 1)])
def test_who_does_not_take_it_is_named_without_its_address(status: int, attempts: int) -> None:
    """A refusal for good ends it, and no redirection is followed."""
    with receiving(status) as (server, url):
        assert told(Hooks(webhook=url)) == [f"the webhook was not told (status {status})"]
    assert len(server.got) == attempts
    assert "webhook-signature" not in server.got[0][0]


def test_nothing_is_sent_unsigned_for_want_of_the_key(tmp_path: Path) -> None:
    """A missing, empty or malformed key file."""
    with receiving(204) as (server, url):
        for text in (None, "", "whsec_not base64"):
            secret = tmp_path / f"key-{text}"
            if text is not None:
                secret.write_text(text)
            (line,) = told(Hooks(webhook=url, secret=secret))
            assert "can't be used" in line
    assert server.got == []


def test_a_failing_command_is_told_without_its_arguments() -> None:
    """Exit 1, and a program that is not there."""
    for program in ("false", "/no/such/program"):
        (line,) = told(Hooks(command=(program, "sesame")))
        assert program in line
        assert "sesame" not in line
