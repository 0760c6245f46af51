"""``evidence.json``: what a report says about the original's experts, without a word of the texts.

Statistics are large and are not part of a checkpoint; this is their small part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.manifest import load_record
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.files import write_atomic
from moe_serve.pruning.methods.similarity import cosine

EVIDENCE: Final = "evidence.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerEvidence(_Model):
    """One layer's experts on the calibration tokens."""

    tokens_CN: tuple[tuple[int, ...], ...]
    """Tokens of each domain that selected the expert."""
    cosine_NN: tuple[tuple[int, ...], ...]
    """Cosine of the experts' mean outputs over the tokens that selected them, in hundredths."""


class Evidence(_Model):
    """The file's content."""

    version: Literal[1] = 1
    """Of this file."""
    experts: int
    """N of the original."""
    width: int
    """Neurons of one of its experts, I."""
    top_k: int
    """Experts selected per token."""
    moe_layers: tuple[int, ...]
    """Numbers of the layers with experts."""
    domains: tuple[str, ...] = ()
    """In the order of the C axis."""
    tokens: dict[str, int] = {}
    """Calibration tokens by domain."""
    layers: dict[int, LayerEvidence] = {}
    """Empty where no statistics were at hand."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, statistics: Statistics | None) -> Evidence:
        """Of an original; reads the small tensors of its statistics only."""
        shape = checkpoint.shape
        layers = tuple(checkpoint.family.moe_layers(checkpoint.config))
        sizes = cls(experts=shape.experts, width=shape.width, top_k=shape.top_k, moe_layers=layers)
        return sizes if statistics is None else sizes.observed(statistics)

    def observed(self, statistics: Statistics) -> Evidence:
        """The same with what the statistics say."""
        return self.model_copy(
            update={
                "domains": statistics.domains,
                "tokens": dict(statistics.record["tokens"]),
                "layers": {index: _layer(statistics, index) for index in self.moe_layers},
            }
        )

    def save(self, folder: Path) -> None:
        """Write atomically, on one line: a number a line would treble it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        write_atomic(folder / EVIDENCE, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read it.

        Raises:
            CheckpointError: it is absent or malformed.
        """
        remedy = "give a checkpoint that moe-serve prune wrote"
        return load_record(cls, folder, EVIDENCE, remedy)


def _layer(statistics: Statistics, index: int) -> LayerEvidence:
    small = statistics.small(index, ("count_CN", "output_ND"))
    output_ND = small["output_ND"].double()
    hundredths = (100 * cosine(output_ND, output_ND)).round().to(torch.int64)
    return LayerEvidence(
        tokens_CN=tuple(map(tuple, small["count_CN"].round().to(torch.int64).tolist())),
        cosine_NN=tuple(map(tuple, hundredths.tolist())),
    )
