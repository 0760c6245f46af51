"""Every metric of ours: name, kind, labels, meaning. Units are in the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


_V: Final = ("variant", "model")

CATALOGUE: Final = {
    metric.name: metric
    for metric in (
        Metric(
            "moe_serve_gpu_memory_used_bytes",
            "gauge",
            ("gpu", "uuid", "variant"),
            "GPU memory that a variant's processes hold, as the driver reports it; gpu is 0, of a "
            "MIG instance 0:1. Absent where the driver does not say whose it is.",
        ),
        Metric("moe_serve_gpu_memory_total_bytes", "gauge", ("gpu", "uuid"), "Memory of the GPU."),
        Metric(
            "moe_serve_engine_memory_bytes",
            "gauge",
            (*_V, "kind"),
            "An engine's memory by kind: weights (of the checkpoint it serves), kv_cache, rss.",
        ),
        Metric(
            "moe_serve_kv_cache_capacity_tokens",
            "gauge",
            _V,
            "Tokens whose keys and values fit the engine's cache.",
        ),
        Metric(
            "moe_serve_tokens_total",
            "counter",
            (*_V, "kind"),
            "Tokens processed: prompt, generation.",
        ),
        Metric(
            "moe_serve_time_to_first_token_seconds",
            "histogram",
            _V,
            "From a request's arrival at the engine to its first token.",
        ),
        Metric(
            "moe_serve_inter_token_latency_seconds",
            "histogram",
            _V,
            "Between successive tokens of a request.",
        ),
        Metric(
            "moe_serve_request_duration_seconds",
            "histogram",
            _V,
            "From a request's arrival at the engine to its last token.",
        ),
        Metric(
            "moe_serve_requests_total",
            "counter",
            (*_V, "outcome"),
            "Requests at the proxy by who answered: answered (below 500), failed, cut (connection "
            "lost in flight; also counted in one of the two before), abandoned (the client went "
            "away, or the proxy no longer waited; also answered where headers were there), and "
            "sent, which is all that went out over a connection.",
        ),
        Metric(
            "moe_serve_traffic_weight_ratio",
            "gauge",
            _V,
            "Share of new requests that the routes give a variant, 0 to 1.",
        ),
        Metric(
            "moe_serve_rollout_state", "gauge", ("state",), "1 for the present state, 0 for others."
        ),
        Metric(
            "moe_serve_rollout_step", "gauge", (), "Index of the rollout's step, while it goes on."
        ),
        Metric(
            "moe_serve_guard_difference",
            "gauge",
            ("guard", "bound"),
            "A guard's difference, pruned - original: lower and upper bound, and the margin.",
        ),
        Metric(
            "moe_serve_quality_kl_nats",
            "gauge",
            ("domain",),
            "Probes: lower bound of KL(original to pruned), nats per token, mean of a domain's "
            "latest answers; each place counts for 2 at most.",
        ),
        Metric(
            "moe_serve_quality_top1_agreement_ratio",
            "gauge",
            ("domain",),
            "Probes: share of the places at which both variants' likeliest token is the same.",
        ),
        Metric(
            "moe_serve_quality_probes",
            "gauge",
            ("domain",),
            "Probes that both variants have answered in this rollout.",
        ),
        Metric(
            "moe_serve_routing_drift_ratio",
            "gauge",
            (*_V, "layer"),
            "Share of a layer's expert selections of the last half hour that went to other experts "
            "than on the calibration texts, 0 to 1. Of engines that count selections, and layers "
            "that counted 100 per expert.",
        ),
        Metric(
            "moe_serve_feedback_total",
            "counter",
            ("variant", "verdict"),
            "Votes on answers: good, bad.",
        ),
        Metric(
            "moe_serve_rollout_decisions_total",
            "counter",
            ("decision", "reason"),
            "Changes of the split on record.",
        ),
        Metric(
            "moe_serve_input_age_seconds",
            "gauge",
            ("source",),
            "Since a source last answered; missing data is never shown as zero.",
        ),
        Metric(
            "moe_serve_checkpoint_expert_bytes",
            "gauge",
            ("layer", "kind"),
            "Bytes of a layer's routed experts: original, kept.",
        ),
    )
}
