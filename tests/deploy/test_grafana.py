"""The dashboards: the JSON is what the table says, and names nothing that does not exist."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from tests.support.promql import unknown

FOLDER: Final = Path(__file__).parents[2] / "deploy" / "grafana"


def module() -> ModuleType:
    """The file that writes the dashboards."""
    spec = importlib.util.spec_from_file_location("dashboards", FOLDER / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", ["ab.json", "engine.json"])
def test_the_json_is_current(name: str) -> None:
    """Whoever changes the table writes the JSON again."""
    built = module()
    assert json.loads((FOLDER / name).read_text()) == built.build(built.DASHBOARDS[name])


@pytest.mark.parametrize("name", ["ab.json", "engine.json"])
def test_panels_query_existing_metrics_and_do_not_overlap(name: str) -> None:
    """No expression names a metric that nobody exports; panels lie side by side."""
    board: dict[str, Any] = json.loads((FOLDER / name).read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert unknown(target["expr"]) == set(), panel["title"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
