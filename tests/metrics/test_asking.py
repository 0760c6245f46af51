"""Connections that are kept: used again, given up in time, and never in the way of an answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moe_serve.metrics import asking
from moe_serve.metrics.asking import Connections
from moe_serve.serving.ports import free_port


class Server(ThreadingHTTPServer):
    """Counts connections; answers with the path."""

    def __init__(self, port: int = 0) -> None:
        """Serve in a thread."""
        self.connections = 0
        super().__init__(("127.0.0.1", port), Handler)
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def process_request(self, request: object, client_address: object) -> None:
        """One more."""
        self.connections += 1
        assert isinstance(request, socket.socket)
        self.sockets.append(request)
        super().process_request(request, client_address)

    def end(self) -> None:
        """With all connections, as a process that is killed."""
        self.shutdown()
        self.server_close()
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Keeps its connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Its path, or a failure."""
        body = self.path.encode()
        self.send_response(500 if self.path == "/broken" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """One that runs."""
    running = Server()
    yield running
    running.end()


def test_one_connection_serves_many_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a failure, which is none; one that was idle for long is not used again."""
    kept, url = Connections(), f"http://127.0.0.1:{server.server_port}"
    assert kept.get(f"{url}/a?b=c", 5.0) == b"/a?b=c"
    with pytest.raises(OSError, match="status 500"):
        kept.get(f"{url}/broken", 5.0)
    assert kept.get(url, 5.0) == b"/"
    assert server.connections == 1
    monkeypatch.setattr(asking, "_KEPT_SECONDS", -1.0)
    assert kept.get(url, 5.0) == b"/"
    assert server.connections == 2


def test_a_process_that_began_anew_is_asked_anew() -> None:
    """The connection kept from the one before is no failure."""
    kept, port = Connections(), free_port()
    url = f"http://127.0.0.1:{port}/x"
    for _ in range(2):
        running = Server(port)
        assert kept.get(url, 5.0) == b"/x"
        running.end()
    with pytest.raises(OSError, match="refused"):
        kept.get(url, 5.0)


def test_who_does_not_speak_http_or_answer_in_time_is_no_answer() -> None:
    """Each an OSError, as a refused connection is."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(TimeoutError):
            Connections().get(url, 0.2)
        threading.Thread(target=_babble, args=(mute,), daemon=True).start()
        with pytest.raises(OSError, match="BadStatusLine"):
            Connections().get(url, 5.0)


def _babble(server: socket.socket) -> None:
    server.accept()
    connection, _ = server.accept()
    connection.recv(1000)
    connection.sendall(b"no such protocol\r\n\r\n")
    connection.close()
