"""One row per architecture the plugin serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFamily:
    """How a compact architecture is named, built and laid out in its files."""

    architecture: str
    implementation: str
    """``module:class``, imported by vLLM when the model is built."""
    count_keys: tuple[str, ...]
    """Config keys for N, the first present counts."""
    top_k_key: str
    width_key: str
    experts: str
    """Prefix of a layer's expert tensors in the files."""
    projections: tuple[str, str, str]
    """Endings of gate, up and down weights."""
    sparse_step_key: str | None = None
    dense_layers_key: str | None = None
    first_sparse_key: str | None = None

    def moe_layers(self, config: dict[str, Any]) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        step = int(config.get(self.sparse_step_key, 1) or 1) if self.sparse_step_key else 1
        dense = set(config.get(self.dense_layers_key) or ()) if self.dense_layers_key else set()
        first = int(config.get(self.first_sparse_key) or 0) if self.first_sparse_key else 0
        layers = range(first, int(config["num_hidden_layers"]))
        return tuple(i for i in layers if i not in dense and (i + 1) % step == 0)

    def sizes(self, config: dict[str, Any]) -> tuple[int, int, int]:
        """N experts, top k, I neurons."""
        count = next(config[key] for key in self.count_keys if config.get(key))
        return int(count), int(config[self.top_k_key]), int(config[self.width_key])


FAMILIES: Final = (
    ServedFamily(
        architecture="CompactMixtralForCausalLM",
        implementation="moe_serve_vllm.models:CompactMixtralForCausalLM",
        count_keys=("num_local_experts",),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        experts="model.layers.{layer}.block_sparse_moe.experts.",
        projections=("w1.weight", "w3.weight", "w2.weight"),
    ),
    ServedFamily(
        architecture="CompactQwen3MoeForCausalLM",
        implementation="moe_serve_vllm.models:CompactQwen3MoeForCausalLM",
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        experts="model.layers.{layer}.mlp.experts.",
        projections=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        sparse_step_key="decoder_sparse_step",
        dense_layers_key="mlp_only_layers",
    ),
    ServedFamily(
        architecture="CompactQwen2MoeForCausalLM",
        implementation="moe_serve_vllm.models:CompactQwen2MoeForCausalLM",
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        experts="model.layers.{layer}.mlp.experts.",
        projections=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        sparse_step_key="decoder_sparse_step",
        dense_layers_key="mlp_only_layers",
    ),
    ServedFamily(
        architecture="CompactOlmoeForCausalLM",
        implementation="moe_serve_vllm.models:CompactOlmoeForCausalLM",
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        experts="model.layers.{layer}.mlp.experts.",
        projections=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ),
    ServedFamily(
        architecture="CompactGlm4MoeForCausalLM",
        implementation="moe_serve_vllm.models:CompactGlm4MoeForCausalLM",
        count_keys=("n_routed_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        experts="model.layers.{layer}.mlp.experts.",
        projections=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        first_sparse_key="first_k_dense_replace",
    ),
)


def family_of(config: dict[str, Any]) -> ServedFamily | None:
    """The row for a config, if its architecture is one of ours."""
    names = config.get("architectures") or ()
    return next((f for f in FAMILIES if f.architecture in names), None)
