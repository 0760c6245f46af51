"""Where a compact checkpoint's tensors go, and that every element of the model was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from moe_serve_vllm.errors import WeightsError
from moe_serve_vllm.families import ServedFamily
from moe_serve_vllm.layers import SHARDS, CompactRoutedExperts, compact_layers, layer_index

_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "model.embed_tokens.weight"
_PARAMETERS: Final = {"w1": "w13_weight", "w3": "w13_weight", "w2": "w2_weight"}

Weights = Iterable[tuple[str, torch.Tensor]]


class ExpertWeights:
    """Takes the blocks out of the stream of tensors and writes them into their layers.

    vLLM's models map expert names by the expert count in the config, each in its own way; a layer
    may store more blocks than that.
    """

    def __init__(self, model: nn.Module, family: ServedFamily) -> None:
        """Find the layers; ``family`` says how their tensors are named."""
        self.loaded: set[str] = set()
        """Names of the parameters written."""
        self._layers: dict[int, tuple[str, CompactRoutedExperts]] = {
            layer_index(name): (name, layer) for name, layer in compact_layers(model).items()
        }
        prefix = re.escape(family.experts).replace(re.escape("{layer}"), r"(\d+)")
        self._name = re.compile(rf"{prefix}(\d+)\.(.+)")
        self._shards = dict(zip(family.projections, SHARDS, strict=True))

    def take(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Write the blocks, yield all other tensors."""
        for name, weight in weights:
            found = self._name.fullmatch(name)
            if found is None:
                yield name, weight
            elif (place := self._layers.get(int(found[1]))) is not None:
                module, layer = place
                shard = self._shards[found[3]]
                layer.load(_PARAMETERS[shard], shard, int(found[2]), weight)
                self.loaded.add(f"{module}.{_PARAMETERS[shard]}")
            # Else the layer is another pipeline stage's, or drafts for the original model.


def missing_head(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether the config ties the output to the embedding and vLLM's model does not."""
    own = any(name == _HEAD for name, _ in model.named_parameters())
    return own and bool(config.get("tie_word_embeddings"))


def with_head(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the embedding for the output too, unless the files hold an output of their own."""
    embedding, own = None, False
    for name, weight in weights:
        own |= name == _HEAD
        if name == _EMBEDDING:
            embedding = weight
        yield name, weight
    if embedding is not None and not own:
        yield _HEAD, embedding


@contextmanager
def every_element_written(model: nn.Module, where: str) -> Iterator[set[str]]:
    """Fail if a parameter, or a part of one, kept what was in memory before.

    Elements not yet written are NaN: vLLM fuses several tensors into one parameter, and its own
    check exempts nearly all parameters of unquantised models. Expert layers count for themselves.

    Yields:
        A set for the names of the parameters that were loaded.

    Raises:
        WeightsError: naming parameters that no tensor was loaded into, or not all of it.
    """
    experts = tuple(f"{name}." for name in compact_layers(model))
    parameters = dict(model.named_parameters())
    others = {
        name: parameter.data
        for name, parameter in parameters.items()
        if parameter.is_floating_point() and not name.startswith(experts)
    }
    for data in others.values():
        data.fill_(torch.nan)
    loaded: set[str] = set()
    yield loaded
    problems = [f"no tensor for {name}" for name in sorted(parameters.keys() - loaded)]
    problems += [
        f"{name} is NaN in places: a tensor that is part of it is missing or damaged"
        for name, data in others.items()
        if name in loaded and _has_nan(data)
    ]
    if problems:
        raise WeightsError(where, problems[:8], "fetch the missing shard or prune again")


def _has_nan(data: torch.Tensor) -> bool:
    # The sum is one pass without a copy; it is NaN too where infinities cancel out.
    return bool(data.sum().isnan()) and bool(data.isnan().any())
