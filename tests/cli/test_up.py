"""``up`` as a supervisor: what it says is not worth ending what it serves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest

from benchmarks.fixtures import MODEL
from moe_serve.cli import up
from moe_serve.serving.config import StackConfig
from moe_serve.serving.stack import Stack
from moe_serve.serving.state import StackState
from tests.support.stacks import fake_stack


def _full() -> TextIO:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def _broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.fixture(params=[_full, _broken_pipe], ids=["full disk", "nobody reads"])
def unwritable(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A stream that takes nothing."""
    stream = request.param()
    yield stream
    with suppress(OSError):
        stream.close()


def test_what_cannot_be_said_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, unwritable: TextIO
) -> None:
    """Neither by an error nor by an exit; nor without any stderr."""
    for stream in (unwritable, None):
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(3):
            up._tell("pruned engine ended")


def test_what_is_said_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """A line stays a line, however long; brackets are no markup."""
    text = "[bold] " + "word " * 50
    up._tell(text)
    assert capsys.readouterr() == ("", f"{text}\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_it_serves_where_nobody_reads_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwritable: TextIO, *, as_json: bool
) -> None:
    """What it prints once all is up, too."""
    fake_stack(tmp_path)
    watched: list[Stack] = []

    def bring_up(config: StackConfig, _: Any) -> Stack:
        return Stack(config=config, folder=tmp_path, state=StackState.load(tmp_path))

    def watch(stack: Stack) -> None:
        watched.append(stack)
        raise up._Stopped

    monkeypatch.setattr(up, "bring_up", bring_up)
    monkeypatch.setattr(up, "_watch", watch)
    monkeypatch.setattr(sys, "stdout", unwritable)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        up.up_command(original=MODEL, pruned=MODEL, state=tmp_path, as_json=as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(watched) == 1
