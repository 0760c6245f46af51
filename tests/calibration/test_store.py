"""Statistics that are not what a run needs: why not."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from moe_serve.calibration.merge import merge_statistics
from moe_serve.calibration.store import RECORD, TENSORS, Statistics
from moe_serve.checkpoint.header import read_header
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CalibrationError
from moe_serve.files import read_json, write_json
from moe_serve.progress import Silent
from tests.support.calibrated import calibrated
from tests.support.models import make_model


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """On a small model."""
    root = tmp_path_factory.mktemp("gathered")
    return calibrated(make_model(root / "model", "qwen3_moe"), root)


@pytest.fixture
def copied(gathered: Statistics, tmp_path: Path) -> Path:
    """A folder of one's own."""
    shutil.copytree(gathered.folder, tmp_path / "copied")
    return tmp_path / "copied"


def test_what_is_no_finished_folder_is_refused(copied: Path) -> None:
    """Without its record, or with one of another version."""
    record = read_json(copied / RECORD)
    write_json(copied / RECORD, record | {"version": -1})
    with pytest.raises(CalibrationError, match=rf"{RECORD}: was made by another version"):
        Statistics(copied)
    (copied / RECORD).unlink()
    with pytest.raises(CalibrationError, match=rf"copied: holds no {RECORD}; give the folder"):
        Statistics(copied)


def test_they_belong_to_one_checkpoint(gathered: Statistics, tmp_path: Path) -> None:
    """As its configuration and headers tell."""
    other = open_checkpoint(make_model(tmp_path / "other", "qwen3_moe", experts=16))
    with pytest.raises(CalibrationError, match=r"gathered on another checkpoint than .*other"):
        gathered.check(other)


def test_numbers_that_are_none_are_refused_where_they_are_read(copied: Path) -> None:
    """One NaN among them; the layers without it can be read."""
    entry = next(e for e in read_header(copied / TENSORS) if e.name.startswith("layers.1."))
    with (copied / TENSORS).open("r+b") as file:
        file.seek(entry.start)
        file.write(struct.pack("<d", float("nan")))
    found = Statistics(copied)
    found.layer(0)
    field = entry.name.removeprefix("layers.1.")
    with pytest.raises(CalibrationError, match=rf"{entry.name} holds NaN or infinite values"):
        found.small(1, [field])


def test_sums_that_were_not_gathered_are_named(gathered: Statistics) -> None:
    """Of a layer that the model has not."""
    with pytest.raises(CalibrationError, match=r"lack layers\.7\.count_CN; calibrate again"):
        gathered.small(7, ["count_CN"])


def test_a_whole_calibration_is_no_part_of_one(gathered: Statistics, tmp_path: Path) -> None:
    """There is nothing to add up."""
    with pytest.raises(CalibrationError, match="is a whole calibration, not a shard; use it as"):
        merge_statistics([gathered.folder], tmp_path / "sum", Silent())
    assert not (tmp_path / "sum").exists()
