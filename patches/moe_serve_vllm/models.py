"""The compact architectures: vLLM's own models, refused or built, with our layers inside.

vLLM imports this module when it looks an architecture up and takes the class by its name. Classes
are made then: only the model that is served is imported, and nothing of a vLLM that is not
supported.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor

from moe_serve_vllm.contract import require_supported
from moe_serve_vllm.families import FAMILIES, ServedFamily


def __getattr__(name: str) -> type[Any]:
    """The class of an architecture."""
    family = next((row for row in FAMILIES if row.architecture == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _compact(family)
    return made


def _compact(family: ServedFamily) -> type[Any]:
    """A subclass of the stock model that refuses what can't be served before it builds.

    It takes the blocks out of whatever stream of tensors it is given, so that loading weights anew
    in place, for which vLLM asks no loader, does not go by the config's count of experts.
    """
    require_supported()
    from moe_serve_vllm.support import check, config_of

    # For what it registers: the layers that the stock model is about to use.
    import_module("moe_serve_vllm.layers")
    from moe_serve_vllm.weights import ExpertWeights, missing_head, with_head

    module, _, name = family.stock.partition(":")
    stock = getattr(import_module(f"vllm.model_executor.models.{module}"), name)

    def build(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        check(vllm_config)
        stock.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.missing_head = missing_head(self, config_of(vllm_config))

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        experts = ExpertWeights(self, family)
        given = with_head(weights) if self.missing_head else weights
        return {*stock.load_weights(self, experts.take(given)), *experts.loaded}

    body = {
        "__init__": build,
        "load_weights": load_weights,
        "__module__": __name__,
        "__doc__": f"{name} with stored blocks.",
    }
    return type(family.architecture, (stock,), body)
