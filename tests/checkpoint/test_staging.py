"""An output appears whole or not at all, and is whose it was."""

from __future__ import annotations

import itertools
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from moe_serve.checkpoint.staging import WORK, require_space, staged
from moe_serve.errors import OutputError


def interrupted(target: Path, run: dict[str, int]) -> None:
    """One step of a run that dies after it."""
    with suppress(KeyboardInterrupt), staged(target, run) as staging:
        (staging.path / "made").write_text("1")
        staging.finish("made", 7)
        raise KeyboardInterrupt


def test_a_run_that_died_goes_on(tmp_path: Path) -> None:
    """What was finished is known; the folder has its name only at the end."""
    target = tmp_path / "out"
    interrupted(target, {"seed": 1})
    assert not target.exists()
    with staged(target, {"seed": 1}) as staging:
        assert staging.resumed
        assert (staging.done("made"), staging.done("other")) == (7, None)
    assert (target / "made").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["made"]


def killed_at_its_end(target: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int) -> None:
    """A run that dies in the ``at``-th call of a function that tidies or names its output."""
    owner = shutil if call == "rmtree" else Path
    real, calls = getattr(owner, call), itertools.count(1)

    def dying(path: Path, *args: object, **options: object) -> object:
        if (path.parent == target.parent or path.name == WORK) and next(calls) == at:
            if call == "rmtree":
                min(path.iterdir()).unlink()
            raise KeyboardInterrupt
        return real(path, *args, **options)

    with staged(target, {}) as staging:
        (staging.path / "made").write_text("1")
        (staging.work / "zeros").touch()
        staging.finish("made", 7)
        monkeypatch.setattr(owner, call, dying)


@pytest.mark.parametrize(("call", "at"), [("replace", 1), ("replace", 2), ("rmtree", 1)])
def test_a_kill_while_the_finished_output_is_tidied(
    call: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has its name the same run ends it, with all that was done; after, it is whole."""
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        killed_at_its_end(target, monkeypatch, call, at)
    monkeypatch.undo()
    if call == "replace":
        assert not target.exists()
        with staged(target, {}) as staging:
            assert staging.done("made") == 7
            assert (staging.work / "zeros").exists()
    else:
        with pytest.raises(OutputError, match="exists already"), staged(target, {}):
            raise AssertionError
        (tmp_path / ".out.lock").unlink()
    assert (target / "made").read_text() == "1"
    assert [path.name for path in target.iterdir()] == ["made"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_made_again_takes_nothing_from_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished one was deleted by hand, its work was not."""
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        killed_at_its_end(target, monkeypatch, "rmtree", 1)
    monkeypatch.undo()
    shutil.rmtree(target)
    with staged(target, {}) as staging:
        assert not staging.resumed
        assert [path.name for path in staging.work.iterdir()] == ["journal.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_is_told_what_differs(tmp_path: Path) -> None:
    """Both ways: a setting of another value, and one that only one of the two has."""
    interrupted(tmp_path / "out", {"seed": 1, "keep": 2})
    with (
        pytest.raises(OutputError, match=r"other settings is here \(differs in keep, more, seed\)"),
        staged(tmp_path / "out", {"seed": 2, "more": 0}),
    ):
        raise AssertionError


def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """With the folder to delete."""
    interrupted(tmp_path / "out", {})
    (journal,) = (tmp_path / "out.partial").rglob("*.json")
    journal.write_text('{"run": {}')
    with (
        pytest.raises(OutputError, match=r"its journal is damaged; delete .*out\.partial and run"),
        staged(tmp_path / "out", {}),
    ):
        raise AssertionError


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    """The second is refused while the first is at it."""
    with (
        staged(tmp_path / "out", {}),
        pytest.raises(OutputError, match="another process is writing this output"),
        staged(tmp_path / "out", {}),
    ):
        raise AssertionError
    assert (tmp_path / "out").is_dir()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """A file, or a folder with anything in it; an empty folder is taken."""
    for name in ("file", "folder/of"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(OutputError, match="exists already"), staged(tmp_path / name, {}):
            raise AssertionError
    with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "folder", {}):
        raise AssertionError
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty", {}) as staging:
        (staging.path / "made").touch()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["made"]


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path) -> None:
    """Also for a folder that is not there yet."""
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OutputError, match=r"needs 1000000\.00 GB on disk, .* GB are free"):
        require_space(tmp_path / "a" / "b", 10**15)
