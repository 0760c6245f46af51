"""Metrics named in PromQL, held against those that somebody exports."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Final

import yaml

from moe_serve.metrics.catalogue import CATALOGUE

PROMETHEUS: Final = Path(__file__).parents[2] / "deploy" / "prometheus"
_NAME: Final = re.compile(r"\b(?:variant:|model:)?(?:moe_serve_|vllm:)[a-z0-9_:]+")
_SUFFIX: Final = re.compile(r"_(bucket|sum|count|total)$")


def rules(name: str) -> list[dict[str, Any]]:
    """All rules of a file in ``deploy/prometheus/rules``."""
    text = (PROMETHEUS / "rules" / name).read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def unknown(expression: str) -> set[str]:
    """Names that are neither recorded by our rules, nor in our catalogue, nor this vLLM's."""
    recorded = {rule["record"] for rule in rules("recording.yml")}
    engine = _engine_metrics()
    return {
        name
        for name in set(_NAME.findall(expression)) - recorded
        if not {name, _SUFFIX.sub("", name)} & (CATALOGUE.keys() | engine)
    }


def _engine_metrics() -> set[str]:
    """From vLLM's source: importing it takes longer than everything else here."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(vllm:[a-z0-9_]+)"', text))
