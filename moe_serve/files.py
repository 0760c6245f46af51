"""Small files read strictly and written atomically; the operating system's words translated."""

from __future__ import annotations

import errno
import glob
import json
import os
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import CheckpointError, IncompleteCheckpoint, OutputError, UsageError

REFETCH: Final = "fetch this file again and compare its size and SHA-256 with the source"
MISMATCH: Final = "fetch config.json and all weights from one revision of one checkpoint"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate what the operating system and the JSON parser say about ``path``."""
    try:
        yield
    except FileNotFoundError as exc:
        raise IncompleteCheckpoint(
            "the file does not exist", where=str(path), remedy="check the path"
        ) from exc
    except OSError as exc:
        raise CheckpointError(
            f"cannot be read ({exc.strerror})", where=str(path), remedy="check permissions and disk"
        ) from exc
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise CheckpointError(
            f"is not valid JSON ({exc})", where=str(path), remedy=REFETCH
        ) from exc


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=str(path), remedy=REFETCH)
    return value


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        UsageError: unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"cannot be read ({exc})", where=str(path), remedy=remedy) from exc


@contextmanager
def validating(where: str, remedy: str) -> Iterator[None]:
    """Translate what pydantic says about settings.

    Raises:
        UsageError: naming every field that is wrong.
    """
    from pydantic import ValidationError  # Rolling back does without.

    try:
        yield
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in exc.errors()]
        raise UsageError("; ".join(problems), where=where, remedy=remedy) from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate what the operating system says about writing ``path``."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                "the disk is full",
                where=str(path),
                remedy="free some space and run the same command again; it resumes",
            ) from exc
        if exc.errno == errno.EFBIG:
            raise OutputError(
                "is larger than this file system or the user's limit allows",
                where=str(path),
                remedy="raise the limit (ulimit -f) or change disks; the same command resumes",
            ) from exc
        raise OutputError(
            f"cannot be written ({exc.strerror or exc})",
            where=str(path),
            remedy="check permissions and the path",
        ) from exc


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    Of several that write it at the same time the last one's content stays, whole. ``mode`` is what
    the umask leaves of it; 0o600 keeps others out from the first byte on.
    """
    # The number of a thread is no other's, in any process, while it runs; so what bears another
    # number is either being written or was left behind, and which of the two can be told.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")

    def private(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with writing(path):
        temporary.unlink(missing_ok=True)
        _remove_left(path)
        try:
            with open(temporary, "xb", opener=private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            # On a full disk the part that did fit would take the room of what comes next.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _remove_left(path: Path) -> None:
    """Remove what writers of ``path`` left behind that were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if number.isdecimal() and not _runs(int(number)):
            with suppress(OSError):
                left.unlink()


def _runs(thread: int) -> bool:
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, keys sorted, so that equal content is equal bytes."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    write_atomic(path, (text + "\n").encode())
