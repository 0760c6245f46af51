"""What the control API takes and gives; the OpenAPI document is made from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.record import Change
from moe_serve.rollout.said import Codes
from moe_serve.rollout.state import Phase

Action = Literal["start", "pause", "resume", "promote", "rollback", "set"]


class _Given(BaseModel):
    """Strict: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class _Told(BaseModel):
    model_config = ConfigDict(
        extra="ignore", from_attributes=True, use_attribute_docstrings=True, frozen=True
    )


class Reason(_Given):
    """Why; kept in the record."""

    reason: Annotated[str, Field(max_length=500)] = ""


class Begin(Reason):
    """Begin a rollout by the policy that ``moe-serve up`` was given.

    No policy is taken from here: its hooks name commands to run.
    """

    force: bool = False
    """Also within the cool-down after a rollback."""


class Weight(Reason):
    """A share of the traffic."""

    pruned_percent: Annotated[float, Field(ge=0.0, le=100.0)]


class Vote(_Given):
    """What somebody thought of an answer."""

    variant: Literal["original", "pruned"]
    """As the answer's header ``x-moe-serve-variant`` said."""
    good: bool


class Moved(_Told):
    """A change of the split that is on disk."""

    pruned_percent: float
    before_percent: float | None
    version: str
    written_at: float
    effective_seconds: float | None
    """From the write until Envoy had it in force; null where Envoy could not be asked."""
    warnings: list[str]


class Done(_Told):
    """What became of a request that may or may not move traffic."""

    state: Phase
    moved: Moved | None


class Problem(_Told):
    """What went wrong, and what to do about it."""

    class Error(_Told):
        """Its text and HTTP status."""

        message: str
        code: int

    error: Error


class Guard(_Told):
    """What one guard knows now: pruned - original as an interval against its margin."""

    guard: str
    unit: Literal["share", "nats"]
    """Of ``lower``, ``upper``, ``margin`` and ``limit``: a share of one, or nats per token."""
    verdict: Literal["harm", "fine", "open"]
    """Harm is proven, excluded, or neither yet."""
    lower: float
    upper: float
    margin: float
    limit: float
    """Below which ``upper`` must come to leave this step."""
    pruned: tuple[float, float]
    """Events, requests."""
    original: tuple[float, float]
    basis: str
    """What pruned was compared with."""
    said: str = ""
    """What was seen, where it is no count of events among requests."""
    needs: str = ""
    """What an open verdict waits for, where that is not requests."""
    codes: dict[str, Codes] = {}
    """``basis``, ``said`` and ``needs`` by code and values, for other languages."""


class DecisionOut(_Told):
    """What the controller last decided, and on what."""

    kind: Literal["hold", "advance", "rollback", "pause"]
    reason: str
    words: str
    codes: Codes | None = None
    """``words`` by code and values, for other languages."""
    evidence: list[Guard]


@dataclass(frozen=True, kw_only=True, config={"use_attribute_docstrings": True})
class ChangeOut(Change):
    """One change of the split."""

    evidence: DecisionOut | None
    """What it rested on; null where a person decided."""


class HistoryPage(_Told):
    """Changes, newest first."""

    changes: list[ChangeOut]
    next_before: int | None
    """Ask with ``before`` this for older ones; null: there are none."""


class StepOut(_Told):
    """One step of the rollout under way."""

    weight: float
    shadow: float
    min_seconds: float
    max_seconds: float
    min_requests: int
    gate: Literal["auto", "hand"]


class Status(_Told):
    """Where traffic goes and how the rollout stands."""

    at: float
    """When this was looked up, seconds since the epoch."""
    model: str
    state: Phase
    step: int
    """Index of the present step."""
    steps: list[StepOut]
    """Of the policy of the rollout under way, or of the last one; empty before the first."""
    step_began: float
    """When the present step began, or the rollout ended; 0 before the first."""
    step_seconds: float
    """For how long the present step was watched, by a clock that nobody sets."""
    reason: str
    """Why it is paused or rolled back."""
    reason_codes: Codes | None = None
    """The same by code and values, where it is the controller's."""
    controller: str | None
    """Who drives it; null: nobody watches."""
    dry_run: bool
    """The rollout under way records what it would do, and moves nothing."""
    decision: DecisionOut | None
    pruned_percent: float
    shadow_percent: float
    version: str
    in_force: bool | None
    """Whether Envoy has the routes that are on disk; null: it does not answer."""
    edited_by_hand: bool
    actions: list[Action]
    """What can be done now."""
    endpoint: str
    last_change: ChangeOut | None


class PointOut(_Told):
    """A guard's interval at one moment."""

    at: float
    step: int
    lower: float
    upper: float
    margin: float


class GuardHistory(_Told):
    """A guard now, and since the rollout began."""

    guard: str
    unit: Literal["share", "nats"]
    now: Guard | None
    points: list[PointOut]


class Guards(_Told):
    """All guards of the present rollout, or of the last one."""

    since: float
    guards: list[GuardHistory]


class PolicyOut(_Told):
    """The rules of the rollout under way, or those that the next one begins with."""

    source: Literal["running", "file", "default"]
    digest: str
    policy: Policy
    """Where a webhook's address is more than a host, the rest is left out: it may be a secret."""


class Latency(_Told):
    """Seconds over the last minutes, interpolated between the engine's histogram edges."""

    p50: float
    p95: float


class Vitals(_Told):
    """One variant's engine. Null: not known now, which is not zero."""

    variant: str
    answers: bool
    weight_bytes: float | None
    cache_bytes: float | None
    cache_tokens: float | None
    """Tokens whose keys and values fit its cache."""
    held_bytes: float | None
    """Memory its processes hold: of the GPUs where there are any, else of the machine."""
    requests_per_second: float | None
    generated_per_second: float | None
    """Tokens."""
    failed_share: float | None
    first_token: Latency | None
    """Time to the first token."""
    between_tokens: Latency | None
    """Time between tokens of a request."""


class Variants(_Told):
    """Both variants side by side, and quality where it is probed."""

    seconds: float
    """What rates and latencies are over; at most five minutes."""
    variants: list[Vitals]
    quality: dict[str, dict[str, float]]
    """Metric → domain → value."""


class LogEntry(_Told):
    """One line of the audit log, as an event."""

    id: int
    kind: str
    at: float
    body: dict[str, Any]
