"""What is tested, against which margins: the tables ``[guards]`` and ``[hard]`` of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field

from moe_serve.rollout.table import Positive, Share, Table

Metric = Literal["ttft", "tpot"]
Part = Literal["truncated", "empty", "abandoned", "feedback"]
COUNTED_BY: Final[Mapping[str, Literal["engine", "proxy", "people"]]] = {
    "truncated": "engine",
    "empty": "engine",
    "abandoned": "proxy",
    "feedback": "people",
}
"""Who counts a share. Of answers, of requests or of votes it is accordingly; only an engine's
counters begin anew with the engine, and copies have neither clients nor votes."""


class ErrorGuard(Table):
    """Requests that failed at the proxy: status 500 and above, resets, streams cut off."""

    margin: Share = 0.005
    """Tolerated difference of failure rates, pruned - original. Half a percentage point: below
    what users notice beside their own network."""
    ratio: float = Field(default=2.0, ge=1.0)
    """Rolled back when pruned provably fails more than this many times as often (and the
    difference is not already shown to be within the margin): the quicker test where failures
    are rare."""


class LatencyGuard(Table):
    """Share of requests slower than an objective."""

    objective: Positive
    """Seconds. Tested at the engine's histogram edge nearest to it, which the evidence names."""
    margin: Share = 0.05
    """Tolerated difference of the shares over the objective. Five points: a pruned model is there
    to be faster; this excludes that it is plainly slower."""
    allowed: Share = 0.1
    """Tolerated share over the objective where there is nothing comparable to compare with."""
    compare: Literal["original", "objective"] = "original"
    """``original``: within strata of concurrency, because load differs by weight; where less than
    half of the pruned requests have a counterpart there, ``objective``."""


class ShareGuard(Table):
    """Share of the answers, or of the votes on them, that are of a kind."""

    margin: Share
    """Tolerated difference of the shares, pruned - original."""


class QualityGuard(Table):
    """What probes say of the pruned variant's predictions, beside the original's."""

    kl: Positive = 0.25
    """Tolerated divergence from the original, nats per token, mean over the probe set (a lower
    bound of it, from the likeliest tokens; each place counts for 2 nats at most). A quarter: about
    what dropping half of the experts by a published rule costs a small model."""
    top1: Share = 0.3
    """Tolerated share of the places at which the likeliest token is another one."""
    domain: float = Field(default=3.0, ge=1.0)
    """No domain's mean divergence may exceed ``kl`` times this: one that is lost must not hide
    behind the others."""


class GarbageGuard(Table):
    """Probes whose answer is empty, loops, changes to a foreign script or is broken text."""

    margin: Share = 0.3
    """Tolerated difference of the shares, pruned - original. Wide: small models loop now and then
    by chance, a set has few probes, and what is meant is a model that falls apart."""


class Guards(Table):
    """Non-inferiority tests against margins. A guard left out (``ttft = "off"``) is not tested."""

    errors: ErrorGuard = ErrorGuard()
    ttft: LatencyGuard | Literal["off"] = LatencyGuard(objective=1.0)
    """Time to first token. One second: where a person begins to wait."""
    tpot: LatencyGuard | Literal["off"] = LatencyGuard(objective=0.1)
    """Time per output token *after the first*, mean of a request
    (``vllm:request_time_per_output_token_seconds``). 0.1 s: faster than people read."""
    truncated: ShareGuard | Literal["off"] = ShareGuard(margin=0.05)
    """Answers that ended at a length limit, or because the engine saw them repeat themselves
    (``vllm:request_success_total``). Five points: a model that has lost its end goes on."""
    empty: ShareGuard | Literal["off"] = ShareGuard(margin=0.02)
    """Answers of one token at most, which is what an empty one comes to
    (``vllm:request_generation_tokens``)."""
    abandoned: ShareGuard | Literal["off"] = "off"
    """Requests whose clients went away before the end, or that took longer than the proxy waits:
    people who no longer want an answer, or no longer wait for it, are in no other figure. Off: one
    program that never waits would weigh as many people; ``moe-serve rollout dependence`` tells how
    alike a client's requests are in this. Not tested on copies, which have no client, and refused
    behind a gateway that is not ours, where nobody counts them."""
    feedback: ShareGuard | Literal["off"] = "off"
    """Votes against an answer (``POST /feedback``). Off: without votes it would never pass."""
    quality: QualityGuard | Literal["off"] = QualityGuard()
    garbage: GarbageGuard | Literal["off"] = GarbageGuard()

    def shares(self) -> dict[Part, ShareGuard]:
        """Those in use that compare shares of answers or votes."""
        found: dict[Part, ShareGuard | Literal["off"]] = {
            "truncated": self.truncated,
            "empty": self.empty,
            "abandoned": self.abandoned,
            "feedback": self.feedback,
        }
        return {name: guard for name, guard in found.items() if isinstance(guard, ShareGuard)}

    @property
    def probed(self) -> int:
        """Tests that rest on probes."""
        return 2 * (self.quality != "off") + (self.garbage != "off")

    def latency(self) -> dict[Metric, LatencyGuard]:
        """Those in use."""
        found: dict[Metric, LatencyGuard] = {}
        if isinstance(self.ttft, LatencyGuard):
            found["ttft"] = self.ttft
        if isinstance(self.tpot, LatencyGuard):
            found["tpot"] = self.tpot
        return found


class Hard(Table):
    """What is acted on at once, without statistics. Far from anything a healthy engine does."""

    failed_share: Share = 0.5
    """Of the pruned requests of the last minute, without the user who failed most."""
    failed_requests: int = Field(default=20, ge=1)
    """As many must have failed for the share to count: one failure of one is no burst."""
    unhealthy_seconds: float = Field(default=15.0, ge=0.0)
    """The pruned engine's health check failing. Its traffic already goes to the original."""
    restarts: int = Field(default=3, ge=1)
    """Restarts of pruned engines..."""
    restart_seconds: Positive = 86_400.0
    """...within so long, under one split. A day: as long as a step lasts at most; after promotion
    the odd restart in a month is no loop."""
    kv_usage: float = Field(default=0.99, gt=0.0, le=1.0)
    """The pruned engine's KV cache this full..."""
    kv_seconds: float = Field(default=300.0, ge=0.0)
    """...for this long while requests wait. Five minutes: a burst passes, a leak does not."""
