"""The two dashboards, as tables of panels; ``python deploy/grafana/dashboards.py`` writes the JSON.

The JSON is what Grafana reads (``provisioning/``); a test holds it against this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_COLOURS: Final = {"original": "#3274d9", "pruned": "#e0752d"}
_SCHEMA: Final = 39
_WIDTH, _HEIGHT = 12, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One time series panel: title, what it tells, unit of Grafana's, and (expression, legend)."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels, two a row."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


AB: Final = Dashboard(
    "moe-serve-ab",
    "moe_serve: original against pruned",
    (
        Panel(
            "Share of new requests",
            "What the route file gives each variant.",
            "percentunit",
            (("moe_serve_traffic_weight_ratio", "{{variant}}"),),
        ),
        Panel(
            "Rollout",
            "The present state; its history is in moe-serve rollout history.",
            "none",
            (("moe_serve_rollout_state == 1", "{{state}}"),),
        ),
        Panel(
            "Requests",
            "A second, by who answered.",
            "reqps",
            (("variant:moe_serve_requests:rate5m", "{{variant}}"),),
        ),
        Panel(
            "Failures and streams cut off",
            "Share of requests. Nothing is shown for a variant without requests.",
            "percentunit",
            (
                ("variant:moe_serve_failures:ratio_rate5m", "{{variant}} failed"),
                ("variant:moe_serve_cuts:ratio_rate5m", "{{variant}} cut"),
            ),
        ),
        Panel(
            "Given up",
            "Share of requests whose clients went away before the end, or that took longer than "
            "the proxy waits. Some always do; the two variants should be alike. Empty behind a "
            "gateway of the cluster's, which does not tell.",
            "percentunit",
            (("variant:moe_serve_abandoned:ratio_rate5m", "{{variant}}"),),
        ),
        Panel(
            "Time to first token",
            "Median and 95th percentile. More traffic means longer waits at equal speed.",
            "s",
            (
                ("variant:moe_serve_time_to_first_token_seconds:p50_5m", "{{variant}} p50"),
                ("variant:moe_serve_time_to_first_token_seconds:p95_5m", "{{variant}} p95"),
            ),
        ),
        Panel(
            "Time between tokens",
            "Median and 95th percentile.",
            "s",
            (
                ("variant:moe_serve_inter_token_latency_seconds:p50_5m", "{{variant}} p50"),
                ("variant:moe_serve_inter_token_latency_seconds:p95_5m", "{{variant}} p95"),
            ),
        ),
        Panel(
            "Tokens generated",
            "A second.",
            "none",
            (('variant:moe_serve_tokens:rate5m{kind="generation"}', "{{variant}}"),),
        ),
        Panel(
            "Weights",
            "Bytes of the checkpoint that each engine serves.",
            "bytes",
            (('moe_serve_engine_memory_bytes{kind="weights"}', "{{variant}}"),),
        ),
        Panel(
            "Room for context",
            "Tokens whose keys and values fit the cache: what the memory saved is worth.",
            "none",
            (("moe_serve_kv_cache_capacity_tokens", "{{variant}}"),),
        ),
        Panel(
            "Pruned over original",
            "95th percentiles and weights; below 1 is a gain.",
            "none",
            (
                ("model:moe_serve_time_to_first_token_seconds:p95_ratio", "first token"),
                ("model:moe_serve_inter_token_latency_seconds:p95_ratio", "between tokens"),
                ("model:moe_serve_weight_bytes:ratio", "weights"),
            ),
        ),
    ),
)

ENGINE: Final = Dashboard(
    "moe-serve-engine",
    "moe_serve: engine health",
    (
        Panel(
            "Since a source last answered",
            "Above 30 s something is down.",
            "s",
            (("moe_serve_input_age_seconds", "{{source}}"),),
        ),
        Panel(
            "Requests in the engine",
            "Running and waiting.",
            "none",
            (
                ("sum by (variant) (vllm:num_requests_running)", "{{variant}} running"),
                ("sum by (variant) (vllm:num_requests_waiting)", "{{variant}} waiting"),
            ),
        ),
        Panel(
            "KV cache in use",
            "Full means queueing and preemption.",
            "percentunit",
            (("max by (variant) (vllm:kv_cache_usage_perc)", "{{variant}}"),),
        ),
        Panel(
            "Preemptions",
            "A second; each computes a prompt again.",
            "none",
            (("sum by (variant) (rate(vllm:num_preemptions_total[5m]))", "{{variant}}"),),
        ),
        Panel(
            "Tokens",
            "A second, read and generated.",
            "none",
            (("variant:moe_serve_tokens:rate5m", "{{variant}} {{kind}}"),),
        ),
        Panel(
            "Whole request",
            "95th percentile from arrival to last token.",
            "s",
            (("variant:moe_serve_request_duration_seconds:p95_5m", "{{variant}}"),),
        ),
        Panel(
            "Memory of the processes",
            "Resident in the host's memory; weights and cache where the engine says.",
            "bytes",
            (("moe_serve_engine_memory_bytes", "{{variant}} {{kind}}"),),
        ),
        Panel(
            "Experts against calibration",
            "Share of selections that went to other experts than on the calibration texts: mean "
            "and worst layer. Of engines started with MOE_SERVE_EXPERT_SELECTIONS.",
            "percentunit",
            (
                ("variant:moe_serve_routing_drift:mean", "{{variant}} mean"),
                ("variant:moe_serve_routing_drift:max", "{{variant}} worst layer"),
            ),
        ),
        Panel(
            "Expert bytes by layer",
            "Original and kept.",
            "bytes",
            (("sum by (kind) (moe_serve_checkpoint_expert_bytes)", "{{kind}}"),),
        ),
    ),
)

# Empty where there is no GPU, so they are apart.
GPU: Final = Panel(
    "GPU memory",
    "What each engine's processes hold, as the driver says.",
    "bytes",
    (
        ("sum by (variant, gpu) (moe_serve_gpu_memory_used_bytes)", "{{variant}} on {{gpu}}"),
        ("moe_serve_gpu_memory_total_bytes", "all of {{gpu}}"),
    ),
)
DASHBOARDS: Final = {"ab.json": AB, "engine.json": ENGINE}


def build(board: Dashboard) -> dict[str, Any]:
    """Grafana's JSON model."""
    panels = [_panel(i, panel) for i, panel in enumerate((*board.panels, GPU))]
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["moe_serve"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Prometheus",
                }
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "rolled back",
                    "datasource": _SOURCE,
                    "enable": True,
                    "iconColor": "red",
                    "expr": _ROLLED_BACK,
                }
            ]
        },
        "panels": panels,
    }


_ROLLED_BACK: Final = 'increase(moe_serve_rollout_decisions_total{decision="rollback"}[1m]) > 0'
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": index + 1,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": {
            "x": index % 2 * _WIDTH,
            "y": index // 2 * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0},
            "overrides": [
                {
                    "matcher": {"id": "byRegexp", "options": f"^{variant}"},
                    "properties": [
                        {"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}
                    ],
                }
                for variant, colour in _COLOURS.items()
            ],
        },
        "options": {"legend": {"showLegend": True, "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": expr,
                "legendFormat": legend,
                "datasource": _SOURCE,
            }
            for i, (expr, legend) in enumerate(panel.queries)
        ],
    }


def main() -> None:
    """Write the JSON beside this file."""
    for name, board in DASHBOARDS.items():
        path = Path(__file__).with_name(name)
        path.write_text(json.dumps(build(board), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
