"""``plan.json``: which neurons of which experts form which stored block, and why."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
)

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import CompactTable, LayerTable
from moe_serve.errors import PlanError
from moe_serve.files import read_json, write_json

VERSION: Final = 1
_LINE: Final = re.compile(r"(?:[0-9]{1,7}(?:-[0-9]{1,7})?(?: |$))*", re.ASCII)
_MOST_NEURONS: Final = 2**20


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Model):
    """Neurons of one original expert, in the order in which they enter a block."""

    expert: int
    """Number in the original."""
    neurons: tuple[int, ...]
    """In the file a line of numbers and ascending runs, as in ``"0 3-7 12"``: large models keep
    millions of neurons."""
    coefficient: float = 1.0
    """By which its weights are multiplied."""

    @field_validator("neurons", mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return expanded(value) if isinstance(value, str) else value

    @field_serializer("neurons", when_used="json")
    def _shorten(self, neurons: tuple[int, ...]) -> str:
        return shortened(neurons)


def shortened(neurons: Sequence[int]) -> str:
    """Numbers in order, runs of consecutive ones as first-last."""
    words: list[str] = []
    first = 0
    for at in range(1, len(neurons) + 1):
        if at == len(neurons) or neurons[at] != neurons[at - 1] + 1:
            last = neurons[at - 1]
            words.append(f"{neurons[first]}-{last}" if at - first > 1 else str(last))
            first = at
    return " ".join(words)


def expanded(text: str) -> tuple[int, ...]:
    """Undo :func:`shortened`.

    Raises:
        ValueError: not such a line, or longer than any expert is wide.
    """
    if not _LINE.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no line of neurons and runs of them")
    found: list[int] = []
    for word in text.split():
        first, dash, last = word.partition("-")
        if not dash:
            found.append(int(first))
            continue
        run = range(int(first), int(last) + 1)
        if not run or len(found) + len(run) > _MOST_NEURONS:
            raise ValueError(f"{word!r} is no run of neurons")
        found += run
    return tuple(found)


class Block(_Model):
    """A stored block: the coefficient-weighted sum of its parts' weights, row by row.

    One part with coefficient 1 is a copy; several are a merge of aligned neurons.
    """

    parts: tuple[Part, ...]
    """What is summed."""


class Split(_Model):
    """Each block is an expert of its own to the router."""

    top_k: int
    """Blocks selected per token."""
    step: float = 0.0
    """By how much the logits of an expert's next block are lower, about."""
    direction: tuple[float, ...] = ()
    """v [D]: against it rows move, by ``step`` for each block of the expert before this one."""

    @property
    def merges(self) -> bool:
        """Whether a block stands for several experts, instead of being a part of one."""
        return not self.direction


class LayerPlan(_Model):
    """One layer's blocks and remapping."""

    width: int
    """Neurons per block."""
    blocks: tuple[Block, ...]
    """In the order in which they are stored."""
    experts: tuple[tuple[int, ...] | None, ...]
    """For each original expert its blocks; ``null``: never selected."""
    constants: bool = False
    """Experts without a block put out a constant, which ``apply`` fits; else nothing."""
    split: Split | None = None
    """``None``: an expert's blocks share its router row."""
    why: dict[str, Any] = Field(default_factory=dict)
    """The scores and errors the choice rests on; per-expert lists have N entries."""

    def table(self) -> LayerTable:
        """As stored in the checkpoint's config."""
        return LayerTable(width=self.width, blocks=len(self.blocks), experts=self.experts)

    def replaced(self) -> tuple[int, ...]:
        """Experts that are a constant."""
        return tuple(e for e, b in enumerate(self.experts) if b == ()) if self.constants else ()

    @property
    def reroutes(self) -> bool:
        """Whether tokens reach other experts than in the original: some are gone or merged."""
        listed = [block for blocks in self.experts for block in blocks or ()]
        return None in self.experts or len(listed) > len(set(listed)) or self.split is not None

    def with_constants(self) -> LayerPlan:
        """The same with a constant for each expert that would never be selected."""
        return self.model_copy(
            update={"constants": True, "experts": tuple(b or () for b in self.experts)}
        )

    def neurons_kept(self) -> int:
        """Neurons stored in this layer."""
        return self.width * len(self.blocks)


class Refit(_Model):
    """Ridge re-fit of the down projections after selection."""

    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Candidates for λ as a multiple of the diagonal; held-out tokens choose."""
    holdout: float = 0.2
    """Share of sequences on which λ is chosen; they join the final fit."""
    side: int = 3072
    """Largest normal matrix; more neurons are fitted in groups (block-coordinate descent)."""
    sweeps: int = 2
    """Passes over the groups when there is more than one."""
    shared: bool = True
    """Whether shared experts in plain numbers take part."""


class NumberFormat(_Model):
    """What happens to the stored numbers of quantised experts."""

    schemes: tuple[str, ...]
    """As the original's configuration names them."""
    tile: int
    """Neurons whose bytes and scales stay together."""
    kept: dict[str, int]
    """Blocks copied byte for byte, by projection: gate, up, down."""
    requantised: dict[str, int]
    """Blocks rounded again in the same scheme, by projection."""


class RouterFit(_Model):
    """Re-fit of the router's rows, after that of the down projections.

    The other way round the rows follow what the down projections can make up for better.
    """

    ridges: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Candidates for λ as a multiple of the normal matrix's mean diagonal."""
    steps: int = 30
    """Conjugate-gradient iterations."""
    margin: float = 0.002
    """Share of the held-out error by which it must fall for new rows to be taken."""


HEAL_ROUNDS: Final = 4


class Heal(_Model):
    """Training of what is kept, after the re-fits."""

    rounds: int = HEAL_ROUNDS
    """Passes in which the original predicts every token of each calibration sequence anew."""
    drafts: int = 3
    """Drafts that each of them draws of a sequence, to train on beside it."""
    redrawn: float = 0.5
    """Share of a draft's tokens that differ from what was predicted on, about."""
    epochs: int = 3
    """Passes over the calibration tokens and their drafts at most."""
    rate: float = 0.006
    """Step as a share of the root mean square of each kind of weight."""
    batch: int = 2048
    """Tokens per step, of sequences drawn from all domains."""
    patience: int = 2
    """Epochs in a row without a gain on held-out tokens, each answered by smaller steps, that
    training bears."""


class Plan(_Model):
    """What ``apply`` carries out."""

    version: Literal[1] = VERSION
    """Of this file."""
    model: str
    """Path of the original, as given."""
    fingerprint: str
    """Of its configuration, its tensors' headers and a few bytes of each."""
    statistics_sha256: str | None
    """Of the statistics; ``null``: from the weights alone."""
    method: str
    """Name of the rule."""
    settings: dict[str, Any]
    """The method's."""
    seed: int
    """Of all that was drawn."""
    keep: float
    """Share of the routed experts' bytes."""
    refit: Refit | None
    """``null``: nothing is re-fitted."""
    router: RouterFit | None = None
    """``null``: the router stays."""
    heal: Heal | None = None
    """``null``: nothing is trained."""
    balance: dict[str, float] | None = None
    """Each domain's part of the weight in statistics and re-fits; ``None``: all the same."""
    layers: dict[int, LayerPlan]
    """Layers that change; the others are copied."""
    numbers: NumberFormat | None = None
    """``None`` where the experts are plain numbers."""

    @property
    def needs_texts(self) -> bool:
        """Whether carrying it out fits something."""
        fitted = any(by is not None for by in (self.refit, self.router, self.heal))
        return fitted or any(p.constants or p.split for p in self.layers.values())

    @property
    def top_k(self) -> int | None:
        """Blocks that the router selects per token, where each has a row of its own.

        Raises:
            PlanError: the layers differ.
        """
        found = {p.split.top_k if p.split else None for p in self.layers.values()}
        if len(found) > 1:
            raise PlanError(
                "layers select different numbers of blocks",
                where="plan.json",
                remedy="make it with moe-serve plan",
            )
        return next(iter(found), None)

    def table(self) -> CompactTable:
        """The remapping of all changed layers."""
        return CompactTable(layers={i: layer.table() for i, layer in self.layers.items()})

    def sha256(self) -> str:
        """Content hash, independent of formatting."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and check the form.

        Raises:
            PlanError: naming every malformed field.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as exc:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:5]
            )
            raise PlanError(
                f"is not a plan ({problems})", where=str(path), remedy="make it with moe-serve plan"
            ) from exc

    def check(self, checkpoint: Checkpoint, where: str = "plan.json") -> None:
        """Refuse a plan that does not fit the checkpoint; ``where`` it was read from.

        Raises:
            PlanError: it was made for another one, or names what does not exist.
        """
        if self.fingerprint != checkpoint.fingerprint():
            raise PlanError(
                f"was made for another checkpoint than {checkpoint.path}",
                where=where,
                remedy="plan again from statistics of this checkpoint",
            )
        shape = checkpoint.shape
        moe_layers = checkpoint.family.moe_layers(checkpoint.config)
        routing = checkpoint.family.routing_of(checkpoint.config)
        defects = []
        for index, layer in self.layers.items():
            if index not in moe_layers:
                defects.append(f"layer {index} holds no experts")
                continue
            found = layer.table().defects(experts=shape.experts, width=shape.width, routing=routing)
            defects += [f"layer {index}: {d}" for d in found]
            defects += [
                f"layer {index}: {d}" for d in _part_defects(layer, shape.experts, shape.width)
            ]
        if defects:
            raise PlanError(
                "; ".join(defects[:5]), where=where, remedy="make it with moe-serve plan"
            )


def _part_defects(layer: LayerPlan, experts: int, width: int) -> list[str]:
    found = []
    for number, block in enumerate(layer.blocks):
        if not block.parts:
            found.append(f"block {number} has no parts")
        for part in block.parts:
            if not 0 <= part.expert < experts:
                found.append(f"block {number} draws on expert {part.expert}")
            if len(part.neurons) != layer.width:
                found.append(f"block {number} has a part of {len(part.neurons)} neurons")
            if any(not 0 <= n < width for n in part.neurons):
                found.append(f"block {number} draws on a neuron beyond {width}")
    return found


def copies(expert: int, order: list[int], width: int) -> list[Block]:
    """Cut one expert's kept neurons into blocks of ``width``; the rest is left out.

    Neurons are sorted inside the kept set so that a kept-whole expert keeps its own order.
    """
    kept = sorted(order[: len(order) // width * width])
    return [
        Block(parts=(Part(expert=expert, neurons=tuple(kept[i : i + width])),))
        for i in range(0, len(kept), width)
    ]
