"""Scrape config, rules and alerts, by Prometheus's own tool."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.promql import PROMETHEUS, rules, unknown

GUIDE: Final = Path(__file__).parents[2] / "docs" / "operations.md"
ALERTS: Final = rules("alerts.yml")


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("test", "rules", "tests/alerts.yml")],
    ids=" ".join,
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    """Syntax of what is scraped and evaluated; alerts and records on written series."""
    ran = subprocess.run(
        ["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_an_alert_is_tested_both_ways_and_explained(alert: str) -> None:
    """Some written series fires it, some other does not, and the guide has a section on it."""
    written = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text(encoding="utf-8"))
    outcomes = {
        bool(check.get("exp_alerts"))
        for test in written["tests"]
        for check in test.get("alert_rule_test", ())
        if check["alertname"] == alert
    }
    assert outcomes == {True, False}
    assert f"### {alert}\n" in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "rule", [*rules("recording.yml"), *ALERTS], ids=lambda rule: next(iter(rule.values()))
)
def test_a_rule_reads_what_there_is(rule: dict[str, Any]) -> None:
    """Each metric in an expression is recorded here, of our catalogue, or of this vLLM."""
    assert unknown(rule["expr"]) == set()
