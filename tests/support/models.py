"""Tiny random models of each family, as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from moe_serve.families import FAMILIES as ROWS
from tests.support.references import new_model

SERVED = tuple(row.model_type for row in ROWS if row.served)
"""Families that the vLLM plugin serves."""
VOCABULARY = 260
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    # Large weights: with the usual 0.02 a wrong expert would hardly show in the logits.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


_SHARED_MLA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_OF: dict[str, dict[str, Any]] = {
    "mixtral": {"count": "num_local_experts", "width": "intermediate_size", "sliding_window": None},
    "qwen3_moe": {"intermediate_size": 64, "norm_topk_prob": True, "mlp_only_layers": []},
    "qwen2_moe": {
        "intermediate_size": 64,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "olmoe": {"width": "intermediate_size"},
    "deepseek_v2": {
        "count": "n_routed_experts",
        "topk_method": "group_limited_greedy",
        **_SHARED_MLA,
        **_GROUPS,
        "intermediate_size": 64,
    },
    "deepseek_v3": {
        "count": "n_routed_experts",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        **_SHARED_MLA,
        **_GROUPS,
        "intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        "count": "n_routed_experts",
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_shared_experts": 1,
        "intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
    },
    "glm4_moe_lite": {
        "count": "n_routed_experts",
        **_SHARED_MLA,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    "dots1": {
        "count": "n_routed_experts",
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_shared_experts": 1,
        "intermediate_size": 64,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
    },
    "minimax_m2": {
        "count": "num_local_experts",
        "width": "intermediate_size",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "rotary_dim": 16,
    },
    "solar_open": {
        "count": "n_routed_experts",
        "n_shared_experts": 1,
        **_GROUPS,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
    },
    "hy_v3": {
        "count": "num_experts",
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_hidden_layers": 3,
        "num_shared_experts": 2,
        "intermediate_size": 64,
        "router_scaling_factor": 1.7,
        "expert_hidden_dim": 64,
    },
    "ernie4_5_moe": {
        "count": "moe_num_experts",
        "top_k": "moe_k",
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "num_hidden_layers": 3,
        "moe_num_shared_experts": 2,
        "intermediate_size": 64,
    },
    "deepseek": {
        "count": "n_routed_experts",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "n_shared_experts": 2,
        "intermediate_size": 64,
        "norm_topk_prob": False,
        "rope_theta": 10000,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    },
}
_OF["kimi_k2"] = _OF["deepseek_v3"]
_OF["deepseek_v32"] = _OF["deepseek_v3"] | {
    "index_topk": 64,
    "index_head_dim": 32,
    "index_n_heads": 2,
}
_OF["glm_moe_dsa"] = _OF["deepseek_v32"] | {"indexer_types": ["full", "shared", "full"]}
"""What each family's config needs beyond the common part, and its names for count and width."""
FAMILIES = tuple(_OF)
SERVABLE = {
    row.model_type: {
        "kv_lora_rank": 512,
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 64),
    }
    for row in ROWS
    if row.latent_attention
}
"""Sizes without which vLLM's latent attention does not run on a CPU."""


def make_model(
    path: Path,
    family: str,
    *,
    experts: int = 8,
    top_k: int = 2,
    width: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random model with a byte tokenizer."""
    torch.manual_seed(seed)
    settings = settings_of(family, experts=experts, top_k=top_k, width=width) | overrides
    model = new_model(family, settings)
    for name, values in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith("e_score_correction_bias"):
            values.data.normal_(std=0.1)
        elif values.ndim == 2 and not values.any():
            # Some routers start at zero in transformers, where every token takes the same experts.
            values.data.normal_(std=settings["initializer_range"])
    save_model(family, model.to(dtype), settings, path)
    _write_tokenizer(path)
    return path


def settings_of(
    family: str, *, experts: int = 8, top_k: int = 2, width: int = 64
) -> dict[str, Any]:
    """The config of a tiny model."""
    extra = dict(_OF[family])
    sizes = {
        extra.pop("count", "num_experts"): experts,
        extra.pop("width", "moe_intermediate_size"): width,
        extra.pop("top_k", "num_experts_per_tok"): top_k,
    }
    return _COMMON | extra | sizes


def save_model(family: str, model: Any, settings: dict[str, Any], path: Path) -> None:
    """Write a model in its published form, whether or not transformers has a class for it."""
    if family == "deepseek":
        names = {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
        path.mkdir(parents=True)
        weights = {name: weight.detach() for name, weight in model.state_dict().items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(settings | names))
        return
    model.save_pretrained(path)
    if family == "kimi_k2":
        change_config(path, model_type=family)


def change_config(path: Path, **changes: Any) -> None:
    """Change values of a model's config; ``None`` removes a key."""
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a model's single weight file."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(path: Path) -> None:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_texts(path: Path, seed: int = 0) -> Path:
    """Two domains of random words, a few thousand bytes each."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for domain, letters in (("vowels", "aeiou "), ("consonants", "bcdfg ")):
        for _ in range(12):
            picks = torch.randint(len(letters), (400,), generator=generator).tolist()
            lines.append({"domain": domain, "text": "".join(letters[i] for i in picks)})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
