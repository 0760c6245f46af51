"""``pilot.toml``: what is tried, what it may lose, what things cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_serve.files import read_toml, validating
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS
from moe_serve.pruning.forecasts.gpus import gpu_memory
from moe_serve.pruning.forecasts.sizing import DEFAULT_KV_TOKENS, parse_size
from moe_serve.pruning.request import DEFAULT_BATCH

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Price = Annotated[float, Field(ge=0.0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tolerance(_Part):
    """What may be lost. A result counts as within it by its measured value, not its interval."""

    mean_kl_nats: float = Field(default=0.05, gt=0.0)
    """Mean KL over domains, nats per token."""
    worst_kl_nats: float = Field(default=0.1, gt=0.0)
    """The same in the domain that loses most."""
    top1_agreement: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least share of tokens whose likeliest successor stays the same; 0: not asked for."""


class Hardware(_Part):
    """The cards that serve."""

    gpu: str = "RTX 4090"
    """A name (as for ``prune --gpu``) or a size such as ``24GiB``."""
    kv_tokens: int = Field(default=DEFAULT_KV_TOKENS, ge=1)
    """Tokens of context that must fit beside the weights."""
    replicas: int = Field(default=1, ge=1)
    """How many engines serve the model."""

    @property
    def memory(self) -> int:
        """Bytes of one card.

        Raises:
            UsageError: neither a name that is known nor a size.
        """
        return parse_size(self.gpu) if self.gpu[:1].isdigit() else gpu_memory(self.gpu)


class Prices(_Part):
    """In one currency. All are assumptions of yours; the page says so."""

    currency: str = "USD"
    """Printed beside each amount."""
    gpu_hour: Price = 0.6
    """One serving card for an hour, bought or rented."""
    machine_hour: Price = 2.0
    """The machine that prunes, for an hour."""
    person_hour: Price = 100.0
    """One person for an hour."""
    hours_a_month: float = Field(default=730.0, gt=0.0, le=744.0)
    """In which the cards are paid for."""


class People(_Part):
    """Hours of people, once. A model to be edited: nobody's hours were measured."""

    texts: Price = 4.0
    """Choosing and approving calibration texts."""
    review: Price = 4.0
    """Reading report and pilot, deciding."""
    rollout: Price = 8.0
    """Set-up, watching the first rollout, handing over."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.texts + self.review + self.rollout


class PilotSettings(_Part):
    """All of ``pilot.toml``."""

    model: Path
    """The original checkpoint."""
    output: Path = Path("pilot")
    """Folder for everything that is made; a run that was stopped goes on there."""
    calibration: tuple[Path, ...] = ()
    """Texts that pruning learns from. None: from the weights alone."""
    texts: tuple[Path, ...]
    """Texts that quality is measured on; others than those for calibration."""
    declaration: Path | None = None
    """``calibration.toml``: the terms of the texts for calibration."""
    purpose: str | None = None
    """What they are used for, as their terms name it."""
    allow_overlap: bool = False
    """Measure even on texts that were calibrated on."""
    skip_overlap: bool = False
    """Leave out documents that were calibrated on; the page says how many."""
    keep: tuple[Share, ...] = (0.75, 0.5)
    """Shares of the routed experts' bytes to try."""
    methods: tuple[str, ...] = ("auto",)
    """Those to try, each with each size."""
    format: Literal["compact", "native"] = "compact"
    """Of the results."""
    tokens: int = Field(default=DEFAULT_TOKENS, ge=1)
    """Per domain, for calibration and for measuring."""
    sequence_length: int = Field(default=DEFAULT_LENGTH, ge=2)
    """Tokens per sequence."""
    batch_tokens: int = Field(default=DEFAULT_BATCH, ge=1)
    """Tokens in memory at once."""
    seed: int = 0
    """Equal seeds give equal bytes."""
    device: str | None = None
    """``cpu`` or ``cuda``; by default the GPU if there is one."""
    prefer: Literal["memory", "quality"] = "memory"
    """Among results within tolerance on the fewest cards: the smallest, or the best."""
    tolerance: Tolerance = Tolerance()
    hardware: Hardware = Hardware()
    prices: Prices = Prices()
    people: People = People()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not self.texts or not self.keep or not self.methods:
            raise ValueError("texts, keep and methods must not be empty")
        # By what names an option: more digits than that would be one folder.
        if len({f"{k:g}" for k in self.keep}) < len(self.keep) or len(set(self.methods)) < len(
            self.methods
        ):
            raise ValueError("keep and methods must not name anything twice")
        if self.allow_overlap and self.skip_overlap:
            raise ValueError("allow_overlap and skip_overlap contradict each other")
        if set(self.texts) & set(self.calibration):
            raise ValueError("measure on other texts than those for calibration")
        return self


def load_settings(path: Path) -> PilotSettings:
    """Read ``pilot.toml``; paths in it are relative to its folder.

    Raises:
        UsageError: unreadable, or naming every field that is wrong.
    """
    values = read_toml(path, "moe-serve pilot --init writes one")
    with validating(str(path), "moe-serve pilot --init shows every field"):
        found = PilotSettings.model_validate(values)
        _ = found.hardware.memory
    base = path.absolute().parent
    return found.model_copy(
        update={
            "model": base / found.model,
            "output": base / found.output,
            "calibration": tuple(base / p for p in found.calibration),
            "texts": tuple(base / p for p in found.texts),
            "declaration": base / found.declaration if found.declaration else None,
        }
    )


TEMPLATE: Final = """\
# moe-serve pilot pilot.toml

# Paths are relative to this file.
model = "{model}"
calibration = ["{calibration}"]  # texts like your traffic, in every language and kind
texts = ["{texts}"]  # others, to measure on
output = "pilot"
# declaration = "calibration.toml"  # owner, licence and terms of the texts for calibration
# purpose = "compression"           # as those terms name it
# skip_overlap = true               # leave out documents that were calibrated on
# allow_overlap = true              # or measure even on them

keep = [0.75, 0.5]     # shares of the routed experts' bytes to try
methods = ["auto"]     # as --method of moe-serve prune; a wrong name lists all
format = "compact"     # or "native": stock layout, no plugin, costs more quality
tokens = {tokens}      # per domain
sequence_length = {length}
prefer = "memory"      # the smallest of those that are good enough; "quality": the best

[tolerance]            # what you are ready to lose
mean_kl_nats = 0.05    # nats per token; 0.05 changes the likeliest token about one time in six
worst_kl_nats = 0.1    # in the domain that loses most
top1_agreement = 0.0   # least share of unchanged likeliest tokens; 0: not asked for

[hardware]
gpu = "RTX 4090"       # or a size: "24GiB"
kv_tokens = 16384      # context that must fit beside the weights
replicas = 1

[prices]               # assumptions of yours; the page repeats them
currency = "USD"
gpu_hour = 0.6         # one serving card
machine_hour = 2.0     # the machine that prunes
person_hour = 100.0
hours_a_month = 730.0

[people]               # hours, once; nobody's were measured
texts = 4.0
review = 4.0
rollout = 8.0
"""
