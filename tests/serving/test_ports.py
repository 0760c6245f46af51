"""Free ports: none given twice, none that an outgoing connection could get."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from moe_serve.errors import ServingError
from moe_serve.serving import ports
from moe_serve.serving.ports import free_port, port_is_free
from tests.support.stacks import LOOPBACKS

OTHERS = """
from moe_serve.serving import ports
ports._POOL, ports._EPHEMERAL = range({}, {}), ports.Path("nowhere")
print(ports.free_port())
"""


def narrowed(monkeypatch: pytest.MonkeyPatch, count: int) -> range:
    """So few to choose from that callers must meet."""
    start = free_port() // count * count
    pool = range(start, start + count)
    monkeypatch.setattr(ports, "_POOL", pool)
    monkeypatch.setattr(ports, "_EPHEMERAL", Path("nowhere"))
    return pool


def the_rest(pool: range) -> list[int]:
    """All that it still gives; then it says that there is none."""
    given: list[int] = []
    with suppress(ServingError):
        while len(given) < len(pool):
            given.append(free_port())
    with pytest.raises(ServingError, match=f"none is free of {pool.start} to {pool.stop - 1}"):
        free_port()
    return given


def test_none_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, or to another one, though nobody listens yet; then it is said."""
    pool = narrowed(monkeypatch, 20)
    asked = OTHERS.format(pool.start, pool.stop)
    child = subprocess.Popen(
        [sys.executable, "-c", asked + "input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout
        theirs = int(child.stdout.readline())
        ours = the_rest(pool)
        assert theirs not in ours
        assert len(set(ours)) == len(ours)
        child.communicate("\n")
    assert free_port() == theirs, "back when that process has ended"


def test_one_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever it is."""
    pool = narrowed(monkeypatch, 10)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", next(p for p in pool if port_is_free("127.0.0.1", p))))
        taken.listen()
        assert taken.getsockname()[1] not in the_rest(pool)


@pytest.mark.parametrize(
    ("outgoing", "pool"),
    [
        ("32768\t60999\n", range(20_000, 30_000)),
        ("15000\t61000\n", range(1024, 15_000)),
        ("1024\t60999\n", range(61_000, 65_536)),
        ("1024\t65535\n", range(20_000, 30_000)),
        ("nonsense", range(20_000, 30_000)),
    ],
)
def test_no_outgoing_connection_gets_one(
    outgoing: str, pool: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine's settings are, unless they leave nothing else."""
    settings = tmp_path / "ip_local_port_range"
    settings.write_text(outgoing)
    monkeypatch.setattr(ports, "_EPHEMERAL", settings)
    assert ports._pool() == pool
    assert free_port() in pool


@pytest.mark.parametrize("host", [*LOOPBACKS, "localhost"])
def test_a_taken_port_is_seen_on_both_families(host: str) -> None:
    """Free before, taken while somebody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        assert not port_is_free(host, taken.getsockname()[1])
    assert port_is_free(host, free_port())


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.name.invalid"])
def test_an_address_of_another_machine_is_said(host: str) -> None:
    """And not called taken."""
    with pytest.raises(ServingError, match="no address of this machine"):
        port_is_free(host, 8000)
