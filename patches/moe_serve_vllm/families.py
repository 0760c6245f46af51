"""One row per architecture the plugin serves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from moe_serve_vllm.errors import TableError

Config = dict[str, Any]
_MANY: Final = 65536
"""More layers or experts than any model has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """A router that first narrows down groups of consecutive experts."""

    count: int
    selected: int
    best: int
    """Experts whose scores rank a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFamily:
    """How a compact architecture is built and laid out in its files."""

    stock: str
    """``module:class`` of the original, within ``vllm.model_executor.models``."""
    count_keys: tuple[str, ...]
    """Config keys for N, the first present counts."""
    top_k_key: str = "num_experts_per_tok"
    width_key: str
    experts: str
    """Prefix of a layer's expert tensors in the files."""
    projections: tuple[str, str, str]
    """Endings of gate, up and down weights."""
    sparse_step_key: str | None = None
    dense_layers_key: str | None = None
    first_sparse_key: str | None = None
    frequency_key: str | None = None
    group_best: int | None = None
    """Experts whose scores rank a group; ``None``: the router knows no groups."""
    latent_attention: bool = False
    """Rotates a slice of the query, whose stride vLLM 0.32's rotary kernel for CPUs ignores."""

    @property
    def architecture(self) -> str:
        """The name in ``config.json``'s ``architectures``."""
        return f"Compact{self.stock.partition(':')[2]}"

    def moe_layers(self, config: Config) -> tuple[int, ...]:
        """Indices of the layers with experts."""

        def number(key: str | None, otherwise: int) -> int:
            given = key is not None and config.get(key) is not None
            return whole(config, key, least=0) if key is not None and given else otherwise

        step, frequency = number(self.sparse_step_key, 1) or 1, number(self.frequency_key, 1) or 1
        listed = (config.get(self.dense_layers_key) or []) if self.dense_layers_key else []
        if not (isinstance(listed, list) and all(type(i) is int for i in listed)):
            raise _wrong(f"{self.dense_layers_key} is no list of layers")
        dense = set(listed)
        layers = range(
            number(self.first_sparse_key, 0), whole(config, "num_hidden_layers", most=_MANY)
        )
        return tuple(
            i for i in layers if i not in dense and (i + 1) % step == 0 and i % frequency == 0
        )

    def sizes(self, config: Config) -> tuple[int, int, int]:
        """N experts, top k, I neurons."""
        key = next((k for k in self.count_keys if config.get(k) is not None), self.count_keys[0])
        experts = whole(config, key, most=_MANY)
        return experts, whole(config, self.top_k_key), whole(config, self.width_key)

    def groups(self, config: Config) -> Groups | None:
        """The router's groups, where there are several."""
        if self.group_best is None or config.get("n_group") in (None, 1):
            return None
        return Groups(
            count=whole(config, "n_group"),
            selected=whole(config, "topk_group"),
            best=self.group_best,
        )


def whole(config: Config, key: str, *, least: int = 1, most: int | None = None) -> int:
    """A whole number of the config.

    Raises:
        TableError: it is missing, something else, or out of range.
    """
    value = config.get(key)
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f"from {least}" if most is None else f"from {least} to {most}"
        raise _wrong(f"{key} is not a whole number {limits}")
    return value


def _wrong(problem: str) -> TableError:
    return TableError("config.json", [problem], "restore it from the pruner's output")


_GATED: Final = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_NUMBERED: Final = ("w1.weight", "w3.weight", "w2.weight")
_QWEN3: Final = ServedFamily(
    stock="qwen3_moe:Qwen3MoeForCausalLM",
    count_keys=("num_experts", "num_local_experts"),
    width_key="moe_intermediate_size",
    experts="model.layers.{layer}.mlp.experts.",
    projections=_GATED,
    sparse_step_key="decoder_sparse_step",
    dense_layers_key="mlp_only_layers",
)
_DEEPSEEK_V3: Final = ServedFamily(
    stock="deepseek_v2:DeepseekV3ForCausalLM",
    count_keys=("n_routed_experts", "num_local_experts"),
    width_key="moe_intermediate_size",
    experts="model.layers.{layer}.mlp.experts.",
    projections=_GATED,
    first_sparse_key="first_k_dense_replace",
    frequency_key="moe_layer_freq",
    group_best=2,
    latent_attention=True,
)

FAMILIES: Final = (
    ServedFamily(
        stock="mixtral:MixtralForCausalLM",
        count_keys=("num_local_experts",),
        width_key="intermediate_size",
        experts="model.layers.{layer}.block_sparse_moe.experts.",
        projections=_NUMBERED,
    ),
    _QWEN3,
    replace(_QWEN3, stock="qwen2_moe:Qwen2MoeForCausalLM"),
    ServedFamily(
        stock="olmoe:OlmoeForCausalLM",
        count_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        experts="model.layers.{layer}.mlp.experts.",
        projections=_GATED,
    ),
    replace(
        _DEEPSEEK_V3,
        stock="deepseek_v2:DeepseekForCausalLM",
        group_best=None,
        latent_attention=False,
    ),
    replace(_DEEPSEEK_V3, stock="deepseek_v2:DeepseekV2ForCausalLM", group_best=1),
    # Kimi K2 too: its configs name DeepSeek-V3's architecture.
    _DEEPSEEK_V3,
    replace(
        _DEEPSEEK_V3,
        stock="glm4_moe:Glm4MoeForCausalLM",
        frequency_key=None,
        latent_attention=False,
    ),
    replace(_DEEPSEEK_V3, stock="glm4_moe_lite:Glm4MoeLiteForCausalLM"),
)


def family_of(config: Config) -> ServedFamily | None:
    """The row for a config, if its architecture is one of ours."""
    names = config.get("architectures")
    listed = names if isinstance(names, list) else []
    return next((f for f in FAMILIES if f.architecture in listed), None)
