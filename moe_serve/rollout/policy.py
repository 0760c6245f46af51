"""``policy.toml``: how a rollout goes. Every field has a default, and the default a reason."""

from __future__ import annotations

import hashlib
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from moe_serve.files import read_toml, validating
from moe_serve.rollout.margins import Guards, Hard
from moe_serve.rollout.table import Positive, Share, Table
from moe_serve.serving.keys import KEY_HEADER
from moe_serve.serving.routes import STICKY


class Step(Table):
    """One share of the traffic, held until the guards say what is needed to leave it."""

    weight: float = Field(ge=0.0, lt=100.0)
    """Percent of requests that the pruned variant answers; 0 for a shadow step. With neither
    weight nor shadow, probes alone are asked: what they tell needs no user."""
    shadow: float = Field(default=0.0, ge=0.0, le=100.0)
    """Percent of requests copied to the pruned variant, its answers thrown away. Only with
    ``weight = 0``: beside real traffic it would add load that the guards then measure."""
    min_seconds: float = Field(default=600.0, ge=0.0)
    """Not left before. Ten minutes: some harm (a leak, a cache that fills) takes time to show."""
    min_requests: int = Field(default=200, ge=1)
    """Pruned requests before it is left, whatever the intervals say; about what it takes to
    exclude an error rate of 2 %."""
    max_seconds: Positive = 86_400.0
    """Then it is inconclusive. A day: every hour of the day has been seen once."""
    gate: Literal["auto", "hand"] = "auto"
    """``hand``: a person lets it on (``rollout resume``); guards go on watching meanwhile."""
    slack: float = Field(default=1.0, ge=1.0)
    """Margins are multiplied by this for *leaving* the step. At 1 % of the traffic a larger harm
    is tolerable and excluding a small one would take days; later steps exclude it."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Step:
        if self.weight > 0.0 and self.shadow > 0.0:
            raise ValueError("a step has a weight or a shadow share, not both")
        return self

    @property
    def traffic(self) -> bool:
        """Whether the pruned variant sees requests of users."""
        return self.weight > 0.0 or self.shadow > 0.0


class Probes(Table):
    """Texts that both engines are asked, for the guards ``quality`` and ``garbage``."""

    texts: Path | None = None
    """Your own, ``.jsonl`` with one ``{"domain": ..., "text": ...}`` a line; relative to the
    policy. The guards speak of these texts: take some like your traffic."""
    default: bool = True
    """Whether the package's own (seven domains, four human languages) are asked too."""
    interval_seconds: Positive = 10.0
    """Between probes; never more than one in flight. The default set takes six minutes, less than
    the first step with users."""
    top: int = Field(default=20, ge=1)
    """Log-probabilities compared per token. Twenty: vLLM's own limit (``--max-logprobs``)."""
    tokens: int = Field(default=64, ge=16)
    """Generated for ``garbage``: enough for a loop to show."""
    sha256: str = ""
    """Of the set; filled in when the rollout starts. A file that then changes is not asked."""


class Freeze(Table):
    """When traffic must not be moved towards the pruned variant. Rolling back always may."""

    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = Field(min_length=1)
    """Of the week."""
    start: time = time(0, 0)
    """In the policy's time zone."""
    end: time = time(23, 59, 59)
    """On the same day, that second included; a window over midnight is two entries."""

    def covers(self, moment: datetime) -> bool:
        """Whether it lies within."""
        day = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[moment.weekday()]
        return day in self.days and self.start <= moment.time().replace(microsecond=0) <= self.end


class Hooks(Table):
    """Told of every decision but a hold, a person's too, as one JSON object.

    None can delay or prevent it. The controller tells, whoever decided: with none running (``up``
    without ``--policy``) nobody is told until one is.
    """

    webhook: str | None = Field(default=None, pattern=r"^https?://")
    """Posted to; what cannot be delivered is tried again for some minutes."""
    secret: Path | None = None
    """File with the key that signs what is posted, as https://www.standardwebhooks.com says:
    ``webhook-signature`` is an HMAC-SHA256 over id, time and body. A file, because the policy is
    kept in the record. Without one nothing is signed."""
    command: tuple[str, ...] = ()
    """Started with the object on its standard input; no shell."""


class Prometheus(Table):
    """Counters from a Prometheus server, for several engines per variant."""

    prometheus: str = Field(pattern=r"^https?://")
    """Address of its API; the part before ``/api/v1``."""
    selector: str = ""
    """More label matchers, e.g. ``model="m",namespace="prod"``. Every series must carry a label
    ``variant`` (``original`` or ``pruned``), as ours do; relabel vLLM's when scraping."""


_DEFAULT: Final = dict(way.split(":", 1) for way in STICKY)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]


class Sticky(Table):
    """What keeps a user, and so a conversation, on one variant.

    The first of them that a request has is hashed by the proxy; a ramp moves users one way only.
    A request that has none is split by chance.
    """

    header: Name = _DEFAULT["header"]
    """Set by the application that calls, to whatever tells its users or conversations apart.
    Empty: none."""
    key: bool = False
    """The API key that the proxy asked for. Not by default: behind one key is often a whole
    application, which would move at once."""
    cookie: Name = _DEFAULT["cookie"]
    """Set for browsers, and for nothing else: a server that keeps cookies has many users behind
    one. Empty: none."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.ways:
            raise ValueError('name a header or a cookie, or write sticky = "off"')
        return self

    @property
    def ways(self) -> tuple[str, ...]:
        """As the route file has them."""
        found = {
            f"header:{self.header}": bool(self.header),
            f"header:{KEY_HEADER}": self.key,
            f"cookie:{self.cookie}": bool(self.cookie),
        }
        return tuple(way for way, used in found.items() if used)


def _default_steps() -> tuple[Step, ...]:
    """Probes alone, then 1 → 5 → 25 → 50 %: little exposed while little is known.

    The first two with users are left with wider margins, the last two with those of the guards.
    """
    return (
        Step(weight=0.0, min_seconds=0.0, max_seconds=3600.0),
        Step(weight=1.0, slack=4.0),
        Step(weight=5.0, slack=2.0, min_requests=500),
        Step(weight=25.0, min_seconds=1800.0, min_requests=1000),
        Step(weight=50.0, min_seconds=1800.0, min_requests=2000),
    )


class Policy(Table):
    """A whole rollout."""

    steps: tuple[Step, ...] = Field(default_factory=_default_steps, min_length=1)
    """In order; after the last one everything goes to the pruned variant."""
    guards: Guards = Guards()
    hard: Hard = Hard()
    probes: Probes = Probes()
    alpha: Share = 0.01
    """Probability that a variant within margins and ratio is ever rolled back by statistics, split
    over steps and guards. One in a hundred: a false alarm costs a day, not users."""
    alpha_advance: Share = 0.05
    """Probability that a guard lets a step pass which is beyond its margin. Not split: all guards
    must pass together (Schultzberg et al., arXiv 2402.11609)."""
    alpha_split: Share = 0.001
    """Of the sample-ratio test, per step. It only holds, so it may be strict."""
    inconclusive: Literal["hold", "pause", "rollback"] = "pause"
    """At a step's maximum time without a verdict. ``pause``: a person decides, the share stays."""
    strata: tuple[float, ...] = (2.0, 8.0, 32.0, 128.0)
    """Edges of the concurrency strata (an engine's running requests), fourfold: latencies within
    one differ less than the margins."""
    dependence: float = Field(default=0.02, ge=0.0, le=1.0)
    """Correlation of two requests of one user: with m requests of each, counts are divided by
    1 + (m-1) times this. The proxy says what m is. A fiftieth, which is assumed: users differ, and
    their requests among themselves far more; ``moe-serve rollout dependence`` measures yours.
    1: each user counts once, and nothing is assumed."""
    design_effect: float = Field(default=1.0, ge=1.0)
    """Counts are divided by this at least. For what the proxy does not see: requests that come
    from one user under many names, or counters from a Prometheus server."""
    sticky: Sticky | Literal["off"] = Sticky()
    """``off``: every request is split on its own, the most informative split, and a conversation
    may meet both variants."""
    metrics: Prometheus | Literal["direct"] = "direct"
    """Where counters come from. ``direct``: this machine's engines and proxy, asked at each
    reading, so that nothing is older than the decision."""
    interval_seconds: Positive = 5.0
    """Between readings; a rollback by statistics is at most this late."""
    warmup_seconds: float = Field(default=30.0, ge=0.0)
    """After each change of the split, not counted: compilation, cold caches, requests in flight."""
    blind_seconds: Positive = 300.0
    """Without usable data for this long the rollout is rolled back; until then it holds."""
    clock_jump_seconds: Positive = 5.0
    """Wall clock against monotonic clock between readings; beyond, the reading is not used."""
    while_paused: Literal["rollback", "nothing"] = "rollback"
    """Whether guards may roll back a paused rollout. Harm does not wait for a person."""
    cooldown_seconds: float = Field(default=3600.0, ge=0.0)
    """After a rollback, before ``start`` may begin again: time to read why."""
    freeze: tuple[Freeze, ...] = ()
    """Times when nothing advances."""
    timezone: str = "UTC"
    """Of the freeze windows."""
    hooks: Hooks = Hooks()
    dry_run: bool = False
    """Record what would have been done, and move no user; a first step may copy requests."""

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as exc:
            raise ValueError(f"no time zone {name!r}") from exc
        return name

    @model_validator(mode="after")
    def _one_way(self) -> Policy:
        weights = [step.weight for step in self.steps]
        shadows = [step.shadow for step in self.steps if step.weight == 0.0]
        rising = weights[len(shadows) :]
        if any(weights[: len(shadows)]) or rising != sorted(set(rising)):
            raise ValueError("steps without weight come first, then weights that rise")
        if not all(step.traffic for step in self.steps) and not self.guards.probed:
            raise ValueError("a step without traffic needs the guards quality or garbage")
        if list(self.strata) != sorted(set(self.strata)):
            raise ValueError("strata must rise")
        return self

    @property
    def tests(self) -> int:
        """Rolling-back tests of a whole rollout, over which ``alpha`` is split."""
        each = 1 + len(self.guards.latency()) + len(self.guards.shares())
        # Results of probes are kept from step to step: one sequence for the whole rollout.
        return max(1, sum(step.traffic for step in self.steps) * each + self.guards.probed)

    def frozen(self, at: float) -> bool:
        """Whether a moment (seconds since the epoch) lies in a freeze window."""
        if not self.freeze:
            return False
        moment = datetime.fromtimestamp(at, ZoneInfo(self.timezone))
        return any(window.covers(moment) for window in self.freeze)

    @property
    def digest(self) -> str:
        """SHA-256 of its content, for the record."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        UsageError: unreadable, or naming every field that is wrong.
    """
    values = read_toml(
        path, "give a TOML file that this user may read; an empty one is the default policy"
    )
    with validating(str(path), "leave a field out to get its default"):
        return _beside(Policy.model_validate(values), path)


def _beside(policy: Policy, path: Path) -> Policy:
    """With the files that it names found from its own folder."""
    folder = path.absolute().parent
    probes, hooks = policy.probes, policy.hooks
    if probes.texts is not None:
        probes = probes.model_copy(update={"texts": (folder / probes.texts).resolve()})
    if hooks.secret is not None:
        hooks = hooks.model_copy(update={"secret": (folder / hooks.secret).resolve()})
    return policy.model_copy(update={"probes": probes, "hooks": hooks})
