"""The control token is its owner's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moe_serve.errors import IncompleteCheckpoint, ServingError
from moe_serve.serving.token import (
    SESSION_SECONDS,
    is_session,
    make_token,
    new_session,
    read_token,
    same,
    session_name,
)


def test_it_is_made_once(tmp_path: Path) -> None:
    """Mode 600; a second start keeps it."""
    path = make_token(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = read_token(tmp_path)
    assert make_token(tmp_path) == path
    assert read_token(tmp_path) == token
    assert same(token, token)
    assert not same(token + "x", token)


def test_one_that_others_could_know_is_refused(tmp_path: Path) -> None:
    """Readable by a group, too short to be one of ours, or not there."""
    with pytest.raises(IncompleteCheckpoint, match="does not exist"):
        read_token(tmp_path)
    path = make_token(tmp_path)
    path.chmod(0o640)
    with pytest.raises(ServingError, match=r"can be read by others \(mode 640\); remove it"):
        read_token(tmp_path)
    path.chmod(0o600)
    path.write_text("secret\n")
    with pytest.raises(ServingError, match="is too short to be a token; remove it"):
        read_token(tmp_path)


def test_a_session_ends_and_belongs_to_its_token() -> None:
    """To the second; no end can be written by hand."""
    session = new_session("a" * 40, now=1000.0)
    last = 1000.0 + SESSION_SECONDS
    assert is_session(session, "a" * 40, last - 1)
    assert not is_session(session, "a" * 40, last)
    assert not is_session(session, "b" * 40, 1000.0)
    _, _, signature = session.partition(".")
    for forged in (f"{int(last) + 9}.{signature}", f"x.{signature}", signature, ""):
        assert not is_session(forged, "a" * 40, 1000.0)
    assert session_name("a" * 40) != session_name("b" * 40)
