"""How much to keep and by which method, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import MAX_BLOCKS, MOST_BLOCKS, WIDTH_MULTIPLE
from moe_serve.errors import PlanError, UsageError
from moe_serve.pruning.forecasts.sizing import DEFAULT_KV_TOKENS, keep_for_memory
from moe_serve.pruning.methods.coefficients import coefficients_named
from moe_serve.pruning.methods.registry import AUTO, Method, method_named
from moe_serve.pruning.methods.view import Budget
from moe_serve.pruning.numbers import removal_unit, tile_width
from moe_serve.pruning.plan import HEAL_ROUNDS, Heal

MEAN: Final = "mean"


WORST: Final = "worst-domain"


OBJECTIVES: Final = (MEAN, WORST)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """How much to keep, and by which method."""

    keep: float | None = None
    """Share of the routed experts' bytes."""
    experts: int | None = None
    """Instead: the bytes of this many experts in each layer."""
    memory: int | None = None
    """Instead: bytes of the GPU that it must fit."""
    kv_tokens: int = DEFAULT_KV_TOKENS
    """Tokens whose cache must fit beside the weights."""
    gpu_count: int = 1
    """GPUs of that memory that share the model."""
    method: str = AUTO
    """How to choose; ``docs/methods.md`` lists them."""
    block_width: int | None = None
    """Neurons per stored block; ``None``: the least that the number format allows."""
    refit: bool | None = None
    """``None``: as the method does."""
    router_refit: bool = False
    """Whether the router's rows are re-fitted where that helps."""
    heal: bool = False
    """Whether what is kept is trained towards the original, layer by layer."""
    heal_rounds: int = HEAL_ROUNDS
    """Times that the original writes the texts anew for that; 0: the texts alone."""
    uniform: bool = False
    """Whether all layers get one number of experts of one width, as stock formats need."""
    constants: bool = False
    """Whether experts that go leave a constant."""
    across_layers: bool = True
    """Whether the budget is spent where the loss needs it, or evenly."""
    coefficients: str | None = None
    """``None``: as the method does."""
    drop_when_better: bool | None = None
    """``None``: as the method does."""
    requantise: bool = False
    """Choose neurons freely in a quantised model and round what they make up once more, instead
    of keeping whole tiles with their bytes."""
    objective: str = MEAN
    """What the balance over domains is for: the mean over them, or the worst one."""
    seed: int = 0
    """Equal seeds give equal bytes."""

    @property
    def training(self) -> Heal | None:
        """How what is kept is trained."""
        return Heal(rounds=self.heal_rounds) if self.heal else None

    def resolve(self, checkpoint: Checkpoint, *, texts: bool) -> tuple[Method, Budget, bool]:
        """Method, budget and whether to re-fit, with every impossible wish refused.

        Raises:
            UsageError: contradictory options.
            PlanError: the budget can't be met.
        """
        method = self._method(texts=texts)
        self._check_merging(method, texts=texts)
        self._check_objective(texts=texts)
        keep = self._share(checkpoint)
        tile = tile_width(checkpoint)
        width = block_width(checkpoint, self.block_width, tile, keep) if method.neurons else None
        refit = method.refit if self.refit is None else self.refit
        if self.router_refit and not texts:
            raise UsageError(
                "a re-fit of the router needs calibration texts",
                where="--router-refit",
                remedy="give --calibration PATH or --no-router-refit",
            )
        if refit and not texts:
            raise UsageError(
                "a re-fit needs calibration texts",
                where="--refit",
                remedy="give --calibration PATH or --no-refit",
            )
        if self.heal:
            self._check_heal(checkpoint, texts=texts)
        budget = Budget(
            keep=keep,
            block_width=width or checkpoint.shape.width,
            experts=None if method.neurons else self.experts,
            tile=1 if self.requantise else removal_unit(checkpoint, refit=refit),
            uniform=self.uniform,
            constants=self.constants,
            across_layers=self.across_layers,
            coefficients=self.coefficients,
            drop_when_better=self.drop_when_better,
            seed=self.seed,
        )
        return method, budget, refit

    def _check_heal(self, checkpoint: Checkpoint, *, texts: bool) -> None:
        layer = checkpoint.family.moe_layers(checkpoint.config)[0]
        problems = [
            reason
            for reason, wrong in (
                ("calibration texts, there are none", not texts),
                ("experts in BF16, FP16 or FP32", _rounds(checkpoint, layer)),
                ("a format without constants", self.constants),
            )
            if wrong
        ]
        if problems:
            raise UsageError(
                "healing needs " + " and ".join(problems),
                where="--heal",
                remedy="leave it out, or change that",
            )

    def _method(self, *, texts: bool) -> Method:
        """The method, if the output format has room for what it chooses."""
        constant = "drop-constant"
        if self.constants and self.method == AUTO:
            return method_named(constant, texts=texts)
        method = method_named(self.method, texts=texts)
        if not self.constants and method.name == constant:
            raise UsageError(
                f"{constant} chooses experts that a constant stands for",
                where="--method",
                remedy="give --format substitution, or another method",
            )
        if self.constants and (method.experts is None or method.merges):
            raise UsageError(
                f"{method.name} does not drop whole experts, and this format does nothing else",
                where="--format substitution",
                remedy=f"leave --method out ({constant}), or choose another drop method",
            )
        if self.constants and not texts:
            raise UsageError(
                "constants are fitted to calibration texts",
                where="--format substitution",
                remedy="give --calibration PATH",
            )
        return method

    def _check_objective(self, *, texts: bool) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(
                f"no objective {self.objective!r}",
                where="--objective",
                remedy="choose from " + ", ".join(OBJECTIVES),
            )
        if self.objective != MEAN and not texts:
            raise UsageError(
                "the worst domain can't be told without calibration texts",
                where="--objective",
                remedy="give --calibration PATH",
            )

    def _check_merging(self, method: Method, *, texts: bool) -> None:
        if self.coefficients is None and self.drop_when_better is None:
            return
        if not method.merges:
            raise UsageError(
                f"{method.name} merges nothing",
                where="--coefficients, --drop-when-better",
                remedy="leave these out, or choose a merge method",
            )
        if self.coefficients is not None:
            coefficients_named(self.coefficients, texts=texts)
        if self.drop_when_better and not texts:
            raise UsageError(
                "what is better can't be measured without calibration texts",
                where="--drop-when-better",
                remedy="give --calibration PATH",
            )

    def _share(self, checkpoint: Checkpoint) -> float:
        if sum(wish is not None for wish in (self.keep, self.experts, self.memory)) != 1:
            raise UsageError(
                "give exactly one of --keep, --experts, --memory and --gpu",
                where="--keep, --experts, --memory, --gpu",
                remedy="--keep 0.5 keeps half of the routed experts' bytes",
            )
        if self.memory is not None:
            return keep_for_memory(checkpoint, self.memory, self.kv_tokens, self.gpu_count)
        if self.keep is not None:
            if not 0.0 < self.keep <= 1.0:
                raise UsageError(
                    f"is {self.keep:g}, not in (0, 1]",
                    where="--keep",
                    remedy="--keep 0.5 keeps half of the routed experts' bytes",
                )
            return self.keep
        count = self.experts or 0
        if not 1 <= count <= checkpoint.shape.experts:
            raise PlanError(
                f"is {count}, the model has {checkpoint.shape.experts} experts per layer",
                where="--experts",
                remedy=f"give a number from 1 to {checkpoint.shape.experts}",
            )
        return count / checkpoint.shape.experts


def _rounds(checkpoint: Checkpoint, layer: int) -> bool:
    """Whether experts are stored in a quantised format."""
    return not all(scheme.exact for scheme in checkpoint.expert_scheme(layer))


def block_width(
    checkpoint: Checkpoint, wanted: int | None, tile: int = 1, keep: float = 0.0
) -> int:
    """The width of stored blocks.

    By default the narrowest that lets an expert stay nearly whole in at most 8 blocks, and a layer
    that keeps ``keep`` in as many as GPU kernels can sort: a multiple of 64 (Triton's tiles) for
    experts of 512 neurons and more, of 32 (the CPU kernels') below, and of the number format's
    tile, that divides the expert's width if one does.

    Raises:
        UsageError: ``wanted`` is not servable.
    """
    whole = checkpoint.shape.width
    unit = math.lcm(WIDTH_MULTIPLE, tile)
    if wanted is not None:
        if wanted % unit or not 0 < wanted <= whole:
            why = f", as its number format scales {tile} neurons together" if tile > 1 else ""
            raise UsageError(
                f"is {wanted}, not a multiple of {unit} up to {whole}{why}",
                where="--block-width",
                remedy="leave it out, or give such a number",
            )
        if whole // wanted > MAX_BLOCKS:
            raise UsageError(
                f"{wanted} cuts an expert of {whole} neurons into more than {MAX_BLOCKS} blocks",
                where="--block-width",
                remedy=f"give at least {-(-whole // MAX_BLOCKS)}",
            )
        return wanted
    unit = math.lcm(64 if whole >= 512 else WIDTH_MULTIPLE, tile)
    sortable = math.ceil(keep * checkpoint.shape.experts * whole / MOST_BLOCKS)
    least = max(-(-whole // MAX_BLOCKS), sortable)
    candidates = range(-(-least // unit) * unit, whole + 1, unit)
    if not candidates:
        raise PlanError(
            f"experts of {whole} neurons are too narrow for blocks of {unit}",
            remedy="choose a method that drops or merges whole experts",
            where="--method",
        )
    # Leftover neurons of a width that doesn't divide are lost even to an expert kept "whole".
    dividing = [b for b in candidates if whole % b == 0 and b <= 2 * max(least, unit)]
    return dividing[0] if dividing else candidates[0]
