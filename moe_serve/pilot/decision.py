"""From measured options to a recommendation: arithmetic only, so that it can be checked by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_serve.pilot.settings import PilotSettings, Tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One pruned checkpoint, as measured."""

    name: str
    method: str
    keep: float
    folder: str
    expert_bytes: int
    total_bytes: int
    gpus: int | None
    """Cards that hold it with its cache; ``None``: more than any power of two up to 64."""
    mean_kl: float
    mean_kl_low: float | None
    """Ends of the mean's 95 % interval; ``None``: some domain has one document only."""
    mean_kl_high: float | None
    worst_kl: float
    worst_kl_high: float | None
    """Largest upper end of all domains' 95 % intervals; ``None``: none has two documents."""
    worst_domain: str
    perplexity_ratio: float
    top1: float
    machine_seconds: float
    """Calibration included, which all options share."""
    domains: dict[str, dict[str, Any]]
    overlap: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """File → documents that were not measured on because they were calibrated on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """The original."""

    expert_bytes: int
    total_bytes: int
    gpus: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Money:
    """What an option costs once and saves each month."""

    machine_hours: float
    person_hours: float
    once: float
    gpus_saved: int | None
    """``None`` where the original fits no number of cards that was considered."""
    monthly: float | None
    payback_months: float | None
    """``None`` where nothing is saved."""


def money(option: Option, baseline: Baseline, settings: PilotSettings) -> Money:
    """Once: hours of machine and people at their prices; a month: cards saved at theirs."""
    prices = settings.prices
    machine = option.machine_seconds / 3600
    once = machine * prices.machine_hour + settings.people.total * prices.person_hour
    saved = monthly = payback = None
    if option.gpus is not None and baseline.gpus is not None:
        saved = (baseline.gpus - option.gpus) * settings.hardware.replicas
        monthly = saved * prices.gpu_hour * prices.hours_a_month
        payback = once / monthly if monthly > 0 else None
    return Money(
        machine_hours=machine,
        person_hours=settings.people.total,
        once=once,
        gpus_saved=saved,
        monthly=monthly,
        payback_months=payback,
    )


def loses_less(one: Option, other: Option) -> bool:
    """Whether the texts tell them apart: both have intervals, and these do not overlap."""
    if one.mean_kl_high is None or other.mean_kl_low is None:
        return False
    return one.mean_kl_high < other.mean_kl_low


def front(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both bytes and mean KL as measured, largest first."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.total_bytes, o.mean_kl)):
        if not best or option.mean_kl < best[-1].mean_kl:
            best.append(option)
    return best[::-1]


def knee(options: Sequence[Option], baseline: Baseline) -> Option | None:
    """Where the front bends most: farthest below the line from the original to the smallest.

    Both axes are scaled to that line's ends (Satopää et al. 2011, "Finding a 'kneedle' in a
    haystack"). ``None`` with fewer than two options on the front, where none of them lies below
    the line, or where the texts don't tell the bend from the next option: nothing is known to bend.
    """
    line = front(options)
    if len(line) < 2:
        return None
    last = line[-1]
    span = baseline.total_bytes - last.total_bytes
    if span <= 0 or last.mean_kl <= 0:
        return None
    gains = [
        (baseline.total_bytes - option.total_bytes) / span - option.mean_kl / last.mean_kl
        for option in line
    ]
    best = max(range(len(line)), key=gains.__getitem__)
    # The smallest lies on the line by its making: where none lies below, nothing bends.
    if gains[best] <= 0 or not loses_less(line[best], line[best + 1]):
        return None
    return line[best]


def misses(option: Option, tolerance: Tolerance) -> list[str]:
    """Names of the tolerances that an option exceeds."""
    within = {
        "mean_kl_nats": option.mean_kl <= tolerance.mean_kl_nats,
        "worst_kl_nats": option.worst_kl <= tolerance.worst_kl_nats,
        "top1_agreement": option.top1 >= tolerance.top1_agreement,
    }
    return [name for name, kept in within.items() if not kept]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """What to do."""

    option: Option | None
    """``None``: nothing is within tolerance."""
    nearest: Option
    """Without one: the option that exceeds its tolerance by the smallest factor."""
    fewest_gpus: int | None = None
    candidates: int = 0
    """Options within tolerance."""
    uncertain: bool = False
    """Some domain's interval reaches beyond the tolerance for the worst one."""
    uncertain_mean: bool = False
    """The mean's interval reaches beyond its tolerance."""
    alike: tuple[Option, ...] = ()
    """Others within tolerance on as few cards of which the texts don't tell that they lose more."""


def recommend(options: Sequence[Option], settings: PilotSettings) -> Recommendation:
    """Within tolerance, on the fewest cards, then the smallest or the best, as preferred."""
    tolerance = settings.tolerance
    nearest = min(options, key=lambda o: (_excess(o, tolerance), o.total_bytes))
    good = [option for option in options if not misses(option, tolerance)]
    if not good:
        return Recommendation(option=None, nearest=nearest)
    known = [option.gpus for option in good if option.gpus is not None]
    fewest = min(known) if known else None
    fitting = [option for option in good if option.gpus == fewest]
    if settings.prefer == "memory":
        best = min(fitting, key=lambda o: (o.total_bytes, o.mean_kl, o.name))
    else:
        best = min(fitting, key=lambda o: (o.mean_kl, o.total_bytes, o.name))
    return Recommendation(
        option=best,
        nearest=best,
        fewest_gpus=fewest,
        candidates=len(good),
        uncertain=(best.worst_kl_high or 0.0) > tolerance.worst_kl_nats,
        uncertain_mean=(best.mean_kl_high or 0.0) > tolerance.mean_kl_nats,
        alike=tuple(o for o in fitting if o is not best and not loses_less(best, o)),
    )


def _excess(option: Option, tolerance: Tolerance) -> float:
    """By which factor the most exceeded tolerance is exceeded; at most 1: none is."""
    factors = [option.mean_kl / tolerance.mean_kl_nats, option.worst_kl / tolerance.worst_kl_nats]
    if tolerance.top1_agreement:
        factors.append(tolerance.top1_agreement / max(option.top1, 1e-9))
    return max(factors)
