"""The family table. Adding an architecture is adding a row here and a test parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from moe_serve.errors import UnsupportedFamily
from moe_serve.families.family import Config, Family, Projections
from moe_serve.families.routing import RoutingRule

_GATED: Final = Projections("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_NUMBERED: Final = Projections("w1.weight", "w3.weight", "w2.weight")
_BLOCK: Final = "model.layers.{layer}.mlp"
_SPARSE_BLOCK: Final = "model.layers.{layer}.block_sparse_moe"
_DEEPSEEK_COUNT: Final = ("n_routed_experts", "num_local_experts")
_SIGMOID: Final = RoutingRule(
    score="sigmoid",
    renormalise="norm_topk_prob",
    scale_key="routed_scaling_factor",
    group_score="best-two",
)

_DEEPSEEK_KEYS: Final = (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"))
_DEEPSEEK_V3: Final = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    count_keys=_DEEPSEEK_COUNT,
    top_k_key="num_experts_per_tok",
    width_key="moe_intermediate_size",
    block=_BLOCK,
    gate=f"{_BLOCK}.gate.weight",
    correction_bias=f"{_BLOCK}.gate.e_score_correction_bias",
    expert=f"{_BLOCK}.experts.{{expert}}",
    projections=_GATED,
    routing=_SIGMOID,
    shared=f"{_BLOCK}.shared_experts",
    shared_count_key="n_shared_experts",
    first_sparse_key="first_k_dense_replace",
    frequency_key="moe_layer_freq",
    extra_layers_key="num_nextn_predict_layers",
    ties_in_vllm=False,
    latent_attention=True,
    served=True,
)

# On sequences of up to index_topk tokens its attention is DeepSeek-V3's (arXiv 2512.02556).
_DEEPSEEK_V32: Final = replace(
    _DEEPSEEK_V3,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    skeleton="deepseek_v3",
    indexer="self_attn.indexer.",
    indexed_key="index_topk",
    kinds_key="mlp_layer_types",
    cpu_obstacle="has no sparse attention there",
    served=False,
)

FAMILIES: Final[tuple[Family, ...]] = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        served=True,
        count_keys=("num_local_experts",),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        block=_SPARSE_BLOCK,
        gate=f"{_SPARSE_BLOCK}.gate.weight",
        expert=f"{_SPARSE_BLOCK}.experts.{{expert}}",
        projections=_NUMBERED,
        routing=RoutingRule(renormalise=True),
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        served=True,
        # transformers 5 saves the count under the second name, everything before under the first.
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(renormalise="norm_topk_prob"),
        sparse_step_key="decoder_sparse_step",
        dense_layers_key="mlp_only_layers",
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        served=True,
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(renormalise="norm_topk_prob"),
        shared=f"{_BLOCK}.shared_expert",
        shared_gate=f"{_BLOCK}.shared_expert_gate.weight",
        sparse_step_key="decoder_sparse_step",
        dense_layers_key="mlp_only_layers",
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        served=True,
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(renormalise="norm_topk_prob"),
        ties_in_vllm=False,
    ),
    Family(
        model_type="deepseek",
        architecture="DeepseekForCausalLM",
        count_keys=_DEEPSEEK_COUNT,
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(renormalise="norm_topk_prob"),
        shared=f"{_BLOCK}.shared_experts",
        shared_count_key="n_shared_experts",
        first_sparse_key="first_k_dense_replace",
        frequency_key="moe_layer_freq",
        # arXiv 2401.06066: attention, norms and dense layers are Llama's; the config's keys too.
        skeleton="llama",
        ties_in_vllm=False,
        served=True,
    ),
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        count_keys=_DEEPSEEK_COUNT,
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        # norm_topk_prob is in the configs; neither transformers nor a published model uses it.
        routing=RoutingRule(
            scale_key="routed_scaling_factor",
            group_score="best",
            grouped_only_if=("topk_method", "group_limited_greedy"),
        ),
        shared=f"{_BLOCK}.shared_experts",
        shared_count_key="n_shared_experts",
        first_sparse_key="first_k_dense_replace",
        frequency_key="moe_layer_freq",
        ties_in_vllm=False,
        latent_attention=True,
        served=True,
    ),
    replace(_DEEPSEEK_V3, vllm_keys=_DEEPSEEK_KEYS),
    # Kimi K2 is DeepSeek-V3 under its own name; the architecture in its config is DeepSeek's.
    replace(_DEEPSEEK_V3, model_type="kimi_k2", skeleton="deepseek_v3", vllm_keys=_DEEPSEEK_KEYS),
    replace(_DEEPSEEK_V32, vllm_keys=_DEEPSEEK_KEYS),
    # GLM-5: the same, but layers without an indexer take the choice of the last that has one.
    replace(
        _DEEPSEEK_V32,
        model_type="glm_moe_dsa",
        architecture="GlmMoeDsaForCausalLM",
    ),
    replace(
        _DEEPSEEK_V3,
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        frequency_key=None,
        latent_attention=False,
    ),
    replace(
        _DEEPSEEK_V3,
        model_type="glm4_moe_lite",
        architecture="Glm4MoeLiteForCausalLM",
        frequency_key=None,
        kinds_key="mlp_layer_types",
    ),
    replace(
        _DEEPSEEK_V3,
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        frequency_key=None,
        extra_layers_key=None,
        latent_attention=False,
        # vLLM gave this class up in its version 0.23.
        served=False,
    ),
    replace(
        _DEEPSEEK_V3,
        model_type="solar_open",
        architecture="SolarOpenForCausalLM",
        first_sparse_key=None,
        frequency_key=None,
        extra_layers_key=None,
        latent_attention=False,
        # vLLM has no class of its own for it.
        served=False,
    ),
    Family(
        model_type="hy_v3",
        architecture="HYV3ForCausalLM",
        count_keys=("num_experts", "num_local_experts"),
        top_k_key="num_experts_per_tok",
        width_key="moe_intermediate_size",
        # The published configs say it twice, and vLLM reads the second.
        width_copies=("expert_hidden_dim",),
        block=_BLOCK,
        gate=f"{_BLOCK}.router.gate.weight",
        correction_bias=f"{_BLOCK}.expert_bias",
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(score="sigmoid", renormalise=True, scale_key="router_scaling_factor"),
        shared=f"{_BLOCK}.shared_mlp",
        shared_count_key="num_shared_experts",
        kinds_key="mlp_layer_types",
        first_sparse_key="first_k_dense_replace",
        extra_layers_key="num_nextn_predict_layers",
    ),
    Family(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        count_keys=("moe_num_experts",),
        top_k_key="moe_k",
        width_key="moe_intermediate_size",
        block=_BLOCK,
        gate=f"{_BLOCK}.gate.weight",
        correction_bias=f"{_BLOCK}.moe_statics.e_score_correction_bias",
        bias_is_row=True,
        expert=f"{_BLOCK}.experts.{{expert}}",
        projections=_GATED,
        routing=RoutingRule(renormalise=True),
        shared=f"{_BLOCK}.shared_experts",
        shared_count_key="moe_num_shared_experts",
        first_sparse_key="moe_layer_start_index",
        last_sparse_key="moe_layer_end_index",
        sparse_step_key="moe_layer_interval",
        extra_layers_key="num_nextn_predict_layers",
        extra_prefix="model.mtp_",
        cpu_obstacle="leaves out the bias by which its routers select, without a word",
    ),
    Family(
        model_type="minimax_m2",
        architecture="MiniMaxM2ForCausalLM",
        count_keys=("num_local_experts",),
        top_k_key="num_experts_per_tok",
        width_key="intermediate_size",
        block=_SPARSE_BLOCK,
        gate=f"{_SPARSE_BLOCK}.gate.weight",
        correction_bias=f"{_SPARSE_BLOCK}.e_score_correction_bias",
        expert=f"{_SPARSE_BLOCK}.experts.{{expert}}",
        projections=_NUMBERED,
        routing=RoutingRule(score="sigmoid", renormalise=True),
        extra_layers_key="num_mtp_modules",
        # So the plugin has no row that could be tested.
        cpu_obstacle="has no router there that scores by sigmoid without groups",
        ties_in_vllm=False,
    ),
)

_LINEAR: Final = "most layers have linear attention, which is not streamed"
_SLIDING: Final = "attention slides over few tokens in some layers and not in others"
_NORMED: Final = "what the experts put out is normalised before it joins the residual stream"
_FUSED: Final = "a layer's experts are one tensor"

REFUSED: Final[Mapping[str, str]] = {
    "gpt_oss": "a layer's experts are one tensor, MXFP4 with gate and up neurons interleaved; "
    "experts and router have biases, neurons are clamped, attention has sinks",
    "afmoe": _NORMED,
    "axk1": _NORMED,
    "exaone_moe": _SLIDING,
    "flex_olmo": _NORMED,
    "granitemoe": _FUSED,
    "hunyuan_v1_moe": "one config key sizes routed and shared experts, others are lists by layer",
    "lfm2_moe": "most layers have convolutions in place of attention",
    "mellum": _SLIDING,
    "mimo_v2_flash": _SLIDING,
    "minimax": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "llama4": f"{_FUSED}, and routing weights scale their input",
    "llama4_text": f"{_FUSED}, and routing weights scale their input",
    "phimoe": "sparse-mixer routing weighs its two experts by two different distributions",
    "qwen3_next": _LINEAR,
}
"""Known architectures without a row, and what stands in the way."""

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
        reason = REFUSED.get(str(model_type), "unknown")
        raise UnsupportedFamily(
            f"model_type {model_type!r} has no row in the family table ({reason})",
            where="config.json",
            remedy=f"give a checkpoint of one that has: {known}",
        )
    architectures = config.get("architectures") or [family.architecture]
    if architectures[0] not in (family.architecture, family.compact_architecture):
        raise UnsupportedFamily(
            f"architecture {architectures[0]!r} is not a causal language model of this family",
            where="config.json",
            remedy=f"give the {family.architecture} of this model",
        )
    return family


def rotates_slices(config: Config) -> bool:
    """Whether this model is one that vLLM's rotary kernel for CPUs gets wrong."""
    family = _known(config)
    return family is not None and family.latent_attention


def serving_obstacle(config: Config, *, gpu: bool) -> tuple[str, str] | None:
    """Why vLLM would not serve a checkpoint rightly on this machine, and what to do instead.

    Models without a row are left to vLLM.
    """
    family = _known(config)
    if family is None:
        return None
    if not gpu and family.cpu_obstacle is not None:
        return (
            f"vLLM 0.32 on a processor {family.cpu_obstacle} ({family.model_type})",
            "serve it on a GPU; compare and verify without --engine need no vLLM",
        )
    if unsaid := [f'"{key}": "{value}"' for key, value in family.vllm_keys if key not in config]:
        said = " and ".join(unsaid)
        told = f"config.json does not say {said}, and without that vLLM builds other layers"
        return f"{told} ({family.model_type})", "add that to config.json"
    if "compact_experts" in config and not family.served:
        return (
            f"the vLLM plugin has no row for the compact form of {family.model_type}",
            "serve what moe-serve export --format tied or native makes of it",
        )
    return None


def _known(config: Config) -> Family | None:
    return _BY_TYPE.get(str(config.get("model_type")))
