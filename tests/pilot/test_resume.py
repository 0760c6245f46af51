"""A pilot that was stopped at the worst moments, and one whose settings were changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_serve.errors import UsageError
from moe_serve.pilot import run as module
from moe_serve.pilot.run import run
from moe_serve.pilot.settings import load_settings
from moe_serve.progress import SILENT
from tests.support.models import make_model, write_texts

SETTINGS = """
model = "m"
texts = ["held"]
output = "out"
keep = [0.75]
methods = ["block-magnitude"]
tokens = 256
sequence_length = 64
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """From the weights alone; measured on a folder of texts."""
    make_model(tmp_path / "m", "qwen3_moe", width=64)
    (tmp_path / "held").mkdir()
    write_texts(tmp_path / "held" / "texts.jsonl", seed=1)
    path = tmp_path / "pilot.toml"
    path.write_text(SETTINGS)
    return path


def stopped_after(name: str, path: Path) -> None:
    """Run until ``name`` is done, and not a step further."""
    real: Callable[..., object] = getattr(module, name)

    def killed(*arguments: object, **options: object) -> object:
        real(*arguments, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(load_settings(path), SILENT)


@pytest.mark.parametrize("last", ["prune", "compare"])
def test_it_goes_on_from_any_step(settings: Path, last: str) -> None:
    """Also where what was made is whole and nothing says so yet."""
    stopped_after(last, settings)
    (option,) = run(load_settings(settings), SILENT).options
    assert option.mean_kl > 0
    assert 0 < option.machine_seconds < 60


def test_it_goes_on_from_its_calibration(settings: Path, tmp_path: Path) -> None:
    """Statistics that are whole are used, not made again or refused."""
    write_texts(tmp_path / "texts.jsonl")
    settings.write_text(f'calibration = ["texts.jsonl"]\n{SETTINGS}')
    stopped_after("calibrate", settings)
    made = (tmp_path / "out" / "statistics" / "statistics.json").stat().st_mtime_ns
    found = run(load_settings(settings), SILENT)
    assert (tmp_path / "out" / "statistics" / "statistics.json").stat().st_mtime_ns == made
    assert found.covered


@pytest.mark.parametrize("last", ["prune", "compare"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokens = 256", "tokens = 128"),
        ("[0.75]", "[0.5]\nseed = 1"),
        ("[0.75]", '[0.75]\nformat = "native"'),
    ],
)
def test_what_was_made_by_other_settings_is_not_gone_on_with(
    settings: Path, last: str, old: str, new: str
) -> None:
    """Nothing was measured yet, but the folder holds a model or the original's outputs."""
    stopped_after(last, settings)
    settings.write_text(SETTINGS.replace(old, new))
    with pytest.raises(UsageError, match="other settings"):
        run(load_settings(settings), SILENT)


def test_other_texts_in_the_same_folder_are_other_texts(settings: Path, tmp_path: Path) -> None:
    """A figure of before would be told as one of theirs."""
    run(load_settings(settings), SILENT)
    write_texts(tmp_path / "held" / "more.jsonl", seed=2)
    with pytest.raises(UsageError, match="other settings or texts"):
        run(load_settings(settings), SILENT)


def test_a_folder_of_something_else_is_left_alone(settings: Path, tmp_path: Path) -> None:
    """Results of nobody knows which settings."""
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "results" / "block-magnitude-0.75.json").write_text("{}")
    with pytest.raises(UsageError, match="other settings"):
        run(load_settings(settings), SILENT)
