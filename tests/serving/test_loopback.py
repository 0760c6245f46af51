"""Servers of this stack that answer oddly, or not."""

from __future__ import annotations

import socket
import threading

import pytest

from moe_serve.errors import RolloutError
from moe_serve.serving.loopback import ask
from moe_serve.serving.ports import free_port


def answering(answer: bytes) -> str:
    """The address of a server that says this once and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listening, listening.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_body_comes_back() -> None:
    """As it is."""
    address = answering(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nLIVE")
    assert ask("Envoy", address, "GET", "/ready", seconds=5) == "LIVE"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 No\r\ncontent-length: 3\r\n\r\nbad", "Envoy answered 503: bad; the logs"),
        (b"", r"Envoy does not answer \(Remote end closed"),
        (b"nonsense\r\n\r\n", r"Envoy does not answer \(nonsense"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut", "Envoy does not answer .*Incomplete"),
    ],
)
def test_anything_else_is_said(answer: bytes, words: str) -> None:
    """With the address and the path; a server that ends while it speaks is one of these."""
    address = answering(answer)
    with pytest.raises(RolloutError, match=rf"^{address}/ready: {words}"):
        ask("Envoy", address, "GET", "/ready", seconds=5)


def test_nobody_there_is_said() -> None:
    """A port that nothing listens on."""
    with pytest.raises(RolloutError, match=r"does not answer .*; see that moe-serve up runs"):
        ask("the engine", f"127.0.0.1:{free_port()}", "GET", "/", seconds=5)
