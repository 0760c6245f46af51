"""The public port against the hostile and the broken, with the real Envoy."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_serve.errors import UsageError
from moe_serve.rollout.traffic import move
from moe_serve.serving.config import load_stack_config
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied

BODY = {"model": "m", "prompt": "x"}
START = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """An Envoy whose clients may not choose a variant."""
    with proxied(
        tmp_path_factory.mktemp("state"), chunks=1, pause=0.0, pin_allowed=False
    ) as running:
        yield running


def raw(proxy: Proxied, sent: bytes) -> int | None:
    """Send bytes; the status of the answer, ``None`` where the connection just ends."""
    host, port = proxy.endpoint.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(sent)
        try:
            head = connection.recv(65_536)
        except OSError:
            return None
    return int(head.split(b" ")[1]) if head else None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (START + b"x: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (START + b"".join(b"x%d: y\r\n" % i for i in range(150)) + b"\r\n", 431),
        (START + b"transfer-encoding: chunked\r\n\r\nZZ\r\n", 400),
        (START + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (START + b"content-length: -1\r\n\r\n", 400),
        (START + b"bad\x00name: 1\r\n\r\n", 400),
        (START + b"content_length: 3\r\n\r\n", 400),
        (b"GET /v1%2fmodels HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET /v1/%2e%2e/metrics HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        (b"GET /v1/models;/../../metrics HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        (b"GET //metrics HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        (b"GET /v1/models\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"NONSENSE\r\n\r\n", 400),
    ],
    ids=[
        "a long header",
        "many headers",
        "broken chunk",
        "two lengths",
        "negative length",
        "null in a name",
        "underscore in a name",
        "escaped slash",
        "escaped dots",
        "parameter and dots",
        "two slashes",
        "bytes that are no text",
        "TLS on a plain port",
        "no HTTP at all",
    ],
)
def test_broken_requests_are_answered_and_harm_nobody(
    proxy: Proxied, sent: bytes, status: int
) -> None:
    """The right status, nothing reaches an engine, the next client is served."""
    before = proxy.original.started
    assert raw(proxy, sent) == status
    assert proxy.original.started == before
    assert httpx.post(f"{proxy.endpoint}/completions", json=BODY).status_code == 200


def test_the_variant_is_not_the_clients_choice(proxy: Proxied) -> None:
    """Where the header is not allowed it is as if it were not there."""
    answer = httpx.post(f"{proxy.endpoint}/completions", json=BODY, headers={HEADER: PRUNED})
    assert answer.headers[HEADER] == ORIGINAL


def test_slow_senders_hold_nobody_up(proxy: Proxied) -> None:
    """Fifty that send half a header and wait; another client is served, they are let go."""
    host, port = proxy.endpoint.split("/")[2].split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(START)
        began = time.monotonic()
        assert httpx.post(f"{proxy.endpoint}/completions", json=BODY).status_code == 200
        assert time.monotonic() - began < 2
        slow[0].settimeout(20)
        assert slow[0].recv(100).split(b" ")[1] in (b"408", b"400")
    finally:
        for connection in slow:
            connection.close()


def test_a_hung_engine_is_left(tmp_path: Path) -> None:
    """The pruned engine takes connections and never answers: new requests go to the original."""
    with proxied(tmp_path, chunks=1, pause=0.0, pin_allowed=True) as proxy:
        proxy.pruned.hang()
        until = time.monotonic() + 20
        pinned = {HEADER: PRUNED}
        code = 0
        while code != 503 and time.monotonic() < until:
            time.sleep(0.5)
            code = _status(proxy, pinned)
        assert code == 503
        assert _status(proxy, {}) == 200


def test_all_that_waited_on_an_engine_is_asked_of_the_other(tmp_path: Path) -> None:
    """The pruned engine dies with 48 requests before their first byte: none fails."""
    with proxied(tmp_path, chunks=1, pause=0.0) as proxy:
        move(proxy.state, 100, decision="set", reason="")
        # Were it found ill before all of them are there, some would not come to wait on it.
        proxy.pruned.hang(healthy=True)
        with ThreadPoolExecutor(48) as clients:
            answers = [clients.submit(_ask, proxy) for _ in range(48)]
            until = time.monotonic() + 60
            while proxy.pruned.started < 48:
                assert time.monotonic() < until
                time.sleep(0.02)
            proxy.pruned.die()
            assert [a.result() for a in answers] == [200] * 48


def _ask(proxy: Proxied) -> int:
    return httpx.post(f"{proxy.endpoint}/completions", json=BODY, timeout=30).status_code


def test_a_rollback_gets_in_when_clients_hold_every_connection(tmp_path: Path) -> None:
    """Twenty allowed, twenty held: the split still moves, and it is confirmed."""
    with proxied(tmp_path, chunks=1, pause=0.0, max_connections=20) as proxy:
        move(proxy.state, 100, decision="set", reason="")
        host, port = proxy.endpoint.split("/")[2].split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(25)]
        moved = move(proxy.state, 0, decision="rollback", reason="")
        for connection in held:
            connection.close()
        assert moved.effective_seconds is not None
        assert moved.warnings == ()


def _status(proxy: Proxied, headers: dict[str, str]) -> int:
    """Of one request; 0 where nothing comes for a second."""
    try:
        url = f"{proxy.endpoint}/completions"
        return httpx.post(url, json=BODY, headers=headers, timeout=1).status_code
    except httpx.TimeoutException:
        return 0


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself."""
    pem, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key)),
            *("-out", str(pem), "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return pem, key


def test_tls_and_a_renewed_certificate(tmp_path: Path) -> None:
    """Plain text is refused; a certificate replaced by renaming is used without a restart."""
    (tmp_path / "tls").mkdir()
    pem, key = certificate(tmp_path / "tls", "first")
    settings: dict[str, Any] = {"certificate": str(pem), "private_key": str(key)}
    with proxied(tmp_path / "state", chunks=1, pause=0.0, **settings) as proxy:
        trusting = ssl.create_default_context(cafile=str(pem))
        assert httpx.get(f"{proxy.endpoint}/models", verify=trusting).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http{proxy.endpoint.removeprefix('https')}/models")
        renewed, its_key = certificate(tmp_path, "second")
        trusting = ssl.create_default_context(cafile=str(renewed))
        its_key.replace(key)
        renewed.replace(pem)
        until = time.monotonic() + 10
        while True:
            try:
                assert httpx.get(f"{proxy.endpoint}/models", verify=trusting).status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < until
                time.sleep(0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tls_certificate": "a.pem"}, "belong together"),
        ({"tls_certificate": "a.pem", "tls_key": "a.key"}, "a.pem is no file"),
        ({"original_url": "https://x"}, "http://host:port"),
        ({"max_connections": 0}, "max_connections"),
    ],
)
def test_settings_are_checked(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    """Before anything starts."""
    with pytest.raises(UsageError, match=words):
        load_stack_config(None, {"original": tmp_path, "pruned": tmp_path, **fields})
