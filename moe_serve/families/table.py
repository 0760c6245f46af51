"""The family table. Adding an architecture is adding a row here and a test parameter."""

from __future__ import annotations

from typing import Final

from moe_serve.errors import UnsupportedFamily
from moe_serve.families.family import Config, Family, Projections

FAMILIES: Final[tuple[Family, ...]] = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        count_keys=("num_local_experts",),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        block="model.layers.{layer}.block_sparse_moe",
        gate="model.layers.{layer}.block_sparse_moe.gate.weight",
        expert="model.layers.{layer}.block_sparse_moe.experts.{expert}",
        projections=Projections("w1.weight", "w3.weight", "w2.weight"),
        renormalise=True,
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        # transformers 5 saves the count under the second name, everything before under the first.
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        block="model.layers.{layer}.mlp",
        gate="model.layers.{layer}.mlp.gate.weight",
        expert="model.layers.{layer}.mlp.experts.{expert}",
        projections=Projections("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        renormalise="norm_topk_prob",
        sparse_step_key="decoder_sparse_step",
        dense_layers_key="mlp_only_layers",
    ),
)

_BY_TYPE: Final = {family.model_type: family for family in FAMILIES}


def family_of(config: Config) -> Family:
    """Find the row for a ``config.json``.

    Raises:
        UnsupportedFamily: no row has its ``model_type``, or the architecture is another task's.
    """
    model_type = config.get("model_type")
    family = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    known = ", ".join(sorted(_BY_TYPE))
    if family is None:
        raise UnsupportedFamily(
            f"model_type {model_type!r} has no row in the family table",
            where="config.json",
            remedy=f"supported: {known}",
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures[0] not in (family.architecture, family.compact_architecture):
        raise UnsupportedFamily(
            f"architecture {architectures[0]!r} is not a causal language model of this family",
            where="config.json",
            remedy=f"expected {family.architecture}",
        )
    return family
