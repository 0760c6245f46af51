"""Whatever is in a directory, the plugin says so in its own words or accepts it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from moe_serve_vllm.files import check_files
from moe_serve_vllm.table import tables_of
from tests.support.fuzz import INDEX, NAME, run_case, sound


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    """400 damaged tables, configs, headers, indices and manifests; most are refused.

    The rest are changes without consequence, such as another final norm.
    ``benchmarks/serving/fuzz.py`` tries more.
    """
    outcomes = Counter(run_case(seed, tmp_path) for seed in range(400))
    assert outcomes["refused"] > 300
    assert outcomes.keys() == {"refused", "accepted"}


def test_without_damage_it_is_accepted(tmp_path: Path) -> None:
    """The checkpoint that is damaged has no defect of its own."""
    config, weights = sound()
    (tmp_path / NAME).write_bytes(weights)
    family, tables = tables_of(config)
    check_files(tmp_path, family, tables, config)
    assert not (tmp_path / INDEX).exists()
