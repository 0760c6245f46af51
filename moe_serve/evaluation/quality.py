"""What pruning cost on texts, per domain, and how sure that is.

Shape suffixes: D documents, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from moe_serve.calibration.sequences import Sequences

Floats = npt.NDArray[np.float64]
"""Of a sequence's T predicted tokens [T, 4]: KL(original‖pruned) in nats, whether the most likely
successor is the same, and -log p of the token that followed for original and pruned."""
_LEVEL: Final = 0.95
_UTMOST: Final = 700.0
"""Nats whose exponential is a number still."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Quality over some tokens."""

    kl_nats: float
    """KL(original‖pruned) per predicted token, full vocabulary."""
    perplexity_ratio: float
    """Pruned over original."""
    top1_agreement: float
    """Share of tokens whose most likely successor is the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean per token, and how far it may be from that of other texts."""

    mean: float
    error: float
    """Its standard error."""
    freedom: float
    """Degrees of freedom of that."""

    @classmethod
    def of(cls, values_D: Floats, tokens_D: Floats) -> Estimate:
        """From each document's sum: the documents vary, the tokens of one go together.

        With R = Σy / ΣT over n documents and residuals e = y - R·T, the error of R is
        √(n / (n - 1)·Σe²) / ΣT.
        """
        count, total = len(values_D), float(tokens_D.sum())
        mean = float(values_D.sum()) / total
        squares = float(((values_D - mean * tokens_D) ** 2).sum())
        error = float(np.sqrt(squares * count / (count - 1))) / total
        return cls(mean=mean, error=error, freedom=count - 1)

    @classmethod
    def average(cls, parts: Sequence[Estimate]) -> Estimate:
        """Of independent ones, each weighing the same; freedom by Welch and Satterthwaite."""
        squares = np.square([part.error for part in parts])
        spread = float(sum(s**2 / part.freedom for s, part in zip(squares, parts, strict=True)))
        return cls(
            mean=float(np.mean([part.mean for part in parts])),
            error=float(np.sqrt(squares.sum())) / len(parts),
            freedom=float(squares.sum()) ** 2 / spread if spread else np.inf,
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, by Student's t."""
        half = self._quantile * self.error
        return self.mean - half, self.mean + half

    @property
    def interval_on_logarithm(self) -> tuple[float, float]:
        """The same of the logarithm, whose error is that of the mean over the mean.

        For what is skewed and never negative. A mean of nothing has no error: no text had any.
        """
        if self.mean <= 0:
            return self.mean, self.mean
        factor = float(np.exp(self._quantile * self.error / self.mean))
        return self.mean / factor, self.mean * factor

    @property
    def _quantile(self) -> float:
        return float(stats.t.ppf((1 + _LEVEL) / 2, self.freedom))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """Of all that is measured on texts.

    Intervals are Student's t and not percentiles of a bootstrap, which are too narrow for few
    documents: of four they cover 77 %, of eight 85 %, of sixteen 90 %.
    """

    kl: Estimate
    other: Estimate
    """Share of tokens whose most likely successor is another."""
    loss: Estimate
    """Pruned less original: the logarithm of the perplexity ratio."""

    @classmethod
    def of(cls, rows_D: Floats) -> Estimates:
        """From each document's (tokens, kl, agree, loss_original, loss_pruned)."""
        tokens_D, kl_D, agree_D, original_D, pruned_D = rows_D.T
        return cls(
            kl=Estimate.of(kl_D, tokens_D),
            other=Estimate.of(tokens_D - agree_D, tokens_D),
            loss=Estimate.of(pruned_D - original_D, tokens_D),
        )

    @classmethod
    def average(cls, parts: Sequence[Estimates]) -> Estimates:
        """Of several domains, each weighing the same."""
        return cls(
            kl=Estimate.average([part.kl for part in parts]),
            other=Estimate.average([part.other for part in parts]),
            loss=Estimate.average([part.loss for part in parts]),
        )

    @property
    def interval(self) -> tuple[Figures, Figures]:
        """Both ends of each figure's 95 % interval; of agreement the lower first, too."""
        kl, other = self.kl.interval_on_logarithm, self.other.interval_on_logarithm
        low, high = (
            Figures(
                kl_nats=kl[end],
                perplexity_ratio=_ratio(self.loss.interval[end]),
                top1_agreement=1.0 - min(other[1 - end], 1.0),
            )
            for end in (0, 1)
        )
        return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainQuality:
    """One domain."""

    tokens: int
    documents: int
    """Those that the tokens are from."""
    figures: Figures
    estimates: Estimates | None
    """``None``: one document says nothing of how others vary."""

    @property
    def interval(self) -> tuple[Figures, Figures] | None:
        """Of 95 %, over documents like its own."""
        return self.estimates.interval if self.estimates else None


def _ratio(loss: float) -> float:
    """Of perplexities; a finite number, however wrong a model is."""
    return float(np.exp(np.clip(loss, -_UTMOST, _UTMOST)))


def by_domain(sequences: Sequences, values: Sequence[Floats]) -> dict[str, DomainQuality]:
    """Figures and intervals per domain from each sequence's tokens."""
    sums: dict[int, dict[int, Floats]] = {number: {} for number in range(len(sequences.domains))}
    for number, (domain, values_T4) in enumerate(zip(sequences.domain, values, strict=True)):
        owner_T = sequences.document(number)[1:]
        for document in np.unique(owner_T):
            own_T4 = values_T4[owner_T == document]
            row = np.array([len(own_T4), *own_T4.sum(axis=0)])
            found = sums[domain]
            found[int(document)] = found.get(int(document), np.zeros(5)) + row
    return {
        name: _domain(np.array(list(sums[number].values())))
        for number, name in enumerate(sequences.domains)
    }


def _domain(rows_D: Floats) -> DomainQuality:
    tokens, kl, agree, original, pruned = (float(x) for x in rows_D.sum(axis=0))
    return DomainQuality(
        tokens=int(tokens),
        documents=len(rows_D),
        figures=Figures(
            kl_nats=kl / tokens,
            perplexity_ratio=_ratio((pruned - original) / tokens),
            top1_agreement=agree / tokens,
        ),
        estimates=Estimates.of(rows_D) if len(rows_D) > 1 else None,
    )
