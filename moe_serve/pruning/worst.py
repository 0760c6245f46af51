"""A balance over domains under which the worst one fares better (``--objective worst-domain``).

A game between two players. One weighs the domains, by multiplicative weights: a domain's part is
multiplied by exp(η · KL of the domain / greatest KL). The other prunes as well as it can for these
parts: statistics, plan, re-fit. Its outcome is measured on texts that it never saw: each domain's
last sequences. The balance with the least KL of the worst domain is taken; even parts stay unless
beaten by a margin.

Source: Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, arXiv 1911.08731,
algorithm 1, the weights' step; it is Freund and Schapire's (Adaptive game playing using
multiplicative weights, 1999). Losses are divided by the greatest, so that η has no unit.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.collect import Collection, collect
from moe_serve.calibration.sequences import Sequences
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging, staged
from moe_serve.errors import CalibrationError, UsageError
from moe_serve.files import writing
from moe_serve.progress import Progress, Silent
from moe_serve.pruning.corpus import Corpus
from moe_serve.pruning.ground import Measured
from moe_serve.pruning.methods.registry import gradient_tokens
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.trial import Trial

ROUNDS: Final = 4
"""Balances tried, the even one first."""
TOKENS: Final = 65_536
"""Tokens of a round, those it is measured on included. Too few and what a round finds is how
little it learnt of a domain, not what the domain costs."""
RATE: Final = 1.0
"""η."""
MARGIN: Final = 0.02
"""Share of the worst domain's KL by which even parts must be beaten."""
_MEASURED: Final = 0.25
_FOLDER: Final = "balance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One balance and what pruning with it came to."""

    balance: dict[str, float]
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        """For plan and journal."""
        return {"balance": self.balance, "measured_kl": self.measured._asdict()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Round:
        """The inverse of :meth:`to_json`."""
        return cls(balance=row["balance"], measured=Measured(**row["measured_kl"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Game:
    """What the rounds need."""

    checkpoint: Checkpoint
    corpus: Corpus
    selection: Selection
    form: str
    settings: Collection
    staging: Staging
    """Its work folder holds a round's files; finished rounds are recorded there."""

    @property
    def begun(self) -> bool:
        """Whether a round is recorded."""
        return self.staging.done("balance/0") is not None

    def play(self, progress: Progress) -> list[Round]:
        """All rounds. Each reads the weights about five times, on at most :data:`TOKENS` tokens.

        Raises:
            CalibrationError: a domain has but one sequence.
            UsageError: the domains are weighed already.
        """
        if self.corpus.sequences.balance:
            raise UsageError(
                "chooses the weights that a task's would fix",
                where="--objective worst-domain, --task-texts",
                remedy="leave one of them out",
            )
        fitting, measuring = split(self.corpus.sequences)
        domains = self.corpus.sequences.domains
        parts = (1.0 / len(domains),) * len(domains)
        rounds: list[Round] = []
        progress.start("balance domains", ROUNDS)
        for number in range(ROUNDS):
            key = f"balance/{number}"
            if (row := self.staging.done(key)) is None:
                measured = self._measure(parts, fitting, measuring)
                row = Round(
                    balance=dict(zip(domains, parts, strict=True)), measured=measured
                ).to_json()
                self.staging.finish(key, row)
            rounds.append(Round.from_json(row))
            parts = reweighted(parts, [rounds[-1].measured.domains[name] for name in domains])
            progress.advance()
        return rounds

    def _measure(
        self, parts: tuple[float, ...], fitting: Sequence[int], measuring: Sequence[int]
    ) -> Measured:
        sequences = replace(self.corpus.sequences, balance=parts)
        fit = replace(self.corpus, sequences=sequences.subset(fitting))
        record = replace(
            fit.record(self.checkpoint, self.selection.seed),
            gradients=gradient_tokens(self.selection.method, self.checkpoint.shape.hidden),
        )
        with _emptied(self.staging.work / _FOLDER) as folder:
            with staged(folder / "statistics", {}) as staging:
                statistics = collect(
                    self.checkpoint,
                    fit.sequences,
                    record,
                    staging.path,
                    staging,
                    self.settings,
                    Silent(),
                )
                plan = make_plan(
                    self.checkpoint,
                    statistics,
                    self.selection,
                    Silent(),
                    form=self.form,
                    device=self.settings.device,
                )
            trial = Trial(
                checkpoint=self.checkpoint,
                sequences=sequences,
                folder=folder,
                device=self.settings.device,
                batch_tokens=self.settings.batch_tokens,
            )
            chosen = sequences.subset([*fitting, *measuring])
            measured_T = chosen.mask(range(len(fitting), len(chosen.tokens)))
            return trial.compare(chosen, measured_T, plan.layers, plan.refit)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder for a while, without what a process killed in it left there."""
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def best(rounds: Sequence[Round]) -> Round:
    """The round whose worst domain fares best; the first unless it is beaten by the margin."""
    first = rounds[0]
    found = min(rounds, key=lambda r: r.measured.worst)
    beaten = found.measured.worst < (1.0 - MARGIN) * first.measured.worst
    return found if beaten else first


def reweighted(parts: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
    """One step of multiplicative weights: q_d ∝ q_d · exp(η L_d / max L)."""
    greatest = max(losses)
    if greatest <= 0.0:
        return tuple(parts)
    raised = [
        part * math.exp(RATE * loss / greatest) for part, loss in zip(parts, losses, strict=True)
    ]
    total = sum(raised)
    return tuple(part / total for part in raised)


def split(sequences: Sequences) -> tuple[list[int], list[int]]:
    """Sequences that fit and, the last quarter of each domain's, those that measure.

    The last hold other documents than the first, which a random choice would not: documents are
    longer than sequences.

    Raises:
        CalibrationError: a domain has but one sequence.
    """
    most = TOKENS // len(sequences.domains)
    fitting: list[int] = []
    measuring: list[int] = []
    for domain, name in enumerate(sequences.domains):
        own: list[int] = []
        used = 0
        for number, (tokens, of) in enumerate(zip(sequences.tokens, sequences.domain, strict=True)):
            if of == domain and (len(own) < 2 or used + len(tokens) <= most):
                own.append(number)
                used += len(tokens)
        if len(own) < 2:
            raise CalibrationError(
                f"domain {name!r} has one sequence, too little to fit and to measure on",
                where="--objective worst-domain",
                remedy="give it more text, or shorter sequences with --sequence-length",
            )
        last = max(1, round(_MEASURED * len(own)))
        fitting += own[:-last]
        measuring += own[-last:]
    return fitting, measuring
