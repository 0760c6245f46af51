"""What the operating system and parsers say, in our words."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from pydantic import BaseModel

from moe_serve.errors import CheckpointError, IncompleteCheckpoint, OutputError, UsageError
from moe_serve.files import read_json, read_toml, validating, write_atomic, writing


def test_a_full_disk_is_said() -> None:
    """The device that is always full."""
    full = Path("/dev/full")
    with (
        pytest.raises(OutputError, match="/dev/full: the disk is full; free some space"),
        writing(full),
        full.open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_what_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    """A folder where a file should be; a file that is not there, no JSON, or no object."""
    with pytest.raises(OutputError, match=r"cannot be written \(No such file or directory\)"):
        write_atomic(tmp_path / "none" / "file", b"x")
    with pytest.raises(IncompleteCheckpoint, match="the file does not exist; check the path"):
        read_json(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)
    for content, words in ((b"\xff", "is not valid JSON"), (b"[]", "is not a JSON object")):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read_json(tmp_path / "a.json")


def test_a_file_is_replaced_whole_and_kept_from_others(tmp_path: Path) -> None:
    """No temporary file stays; the mode is what was asked for."""
    write_atomic(tmp_path / "secret", b"old", mode=0o600)
    write_atomic(tmp_path / "secret", b"new", mode=0o600)
    assert (tmp_path / "secret").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_two_may_write_a_file_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get through, with neither's content in the other's: one of the two stays, whole."""
    both = Barrier(2)
    monkeypatch.setattr(os, "fsync", lambda _: both.wait(10))
    contents = [b"a" * 1000, b"b" * 2000]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda content: write_atomic(tmp_path / "file", content), contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    """Not what a running one is writing, nor another file's."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom moe_serve.files import write_atomic\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\nwrite_atomic(Path(sys.argv[1]), b'x')"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
        assert len(list(tmp_path.iterdir())) == 1
    kept = {f".file.{os.getppid()}.tmp", ".file.other.1.tmp", ".file.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    write_atomic(tmp_path / "file", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", *kept}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk its part would take the room of what comes next."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_atomic(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"a = ", b"\xff", None])
def test_settings_that_are_no_toml_are_refused(tmp_path: Path, content: bytes | None) -> None:
    """With what the caller says about them."""
    file = tmp_path / "a.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.toml: cannot be read \(.*\); write one"):
        read_toml(file, "write one")


def test_every_field_that_is_wrong_is_named() -> None:
    """With its path."""

    class Inner(BaseModel):
        size: int

    class Outer(BaseModel):
        inner: Inner
        name: str

    with (
        pytest.raises(UsageError, match=r"^here: inner\.size: .*; name: Field required; mend it$"),
        validating("here", "mend it"),
    ):
        Outer.model_validate({"inner": {"size": "x"}})
