"""Each family's model in transformers, whole and in FP32, and our own forward beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_serve.calibration.decoder import Decoder
from moe_serve.checkpoint.source import open_checkpoint

_NAMES = {"model_type", "architectures", "auto_map"}


class DeepseekGate(nn.Module):
    """DeepSeek-MoE's router, arXiv 2401.06066, equations 9 and 10; one token at a time."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, the selected experts' weights, and their ids."""
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        top = logits.softmax(dim=-1).topk(self.config.num_experts_per_tok, dim=-1)
        values = top.values
        if self.config.norm_topk_prob:
            values = values / values.sum(dim=-1, keepdim=True)
        return logits, values, top.indices


class DeepseekMixture(nn.Module):
    """DeepSeek-MoE's layer by plain loops: transformers has no class for it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        narrow = LlamaConfig(
            hidden_size=config.hidden_size, intermediate_size=config.moe_intermediate_size
        )
        wide = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
        )
        self.gate = DeepseekGate(config)
        self.experts = nn.ModuleList(LlamaMLP(narrow) for _ in range(config.n_routed_experts))
        self.shared_experts = LlamaMLP(wide)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, chosen = self.gate(flat)
        rows = [
            sum(w * self.experts[e](z) for w, e in zip(ws, es.tolist(), strict=True))
            for z, ws, es in zip(flat, weights, chosen, strict=True)
        ]
        return torch.stack(rows).view_as(hidden) + self.shared_experts(hidden)


def new_model(family: str, settings: dict[str, Any]) -> Any:
    """A random model of a family."""
    if family == "deepseek":
        return _new_deepseek(settings)
    own = "deepseek_v3" if family == "kimi_k2" else family
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(own, **settings))


def _new_deepseek(settings: dict[str, Any]) -> LlamaForCausalLM:
    config = {k: settings[k] for k in settings.keys() - _NAMES}
    model = LlamaForCausalLM(LlamaConfig(**config))
    for layer in model.model.layers[config["first_k_dense_replace"] :]:
        layer.mlp = DeepseekMixture(model.config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=config["initializer_range"])
    return model


def load_reference(path: Path) -> Any:
    """The whole model in FP32."""
    config = json.loads((path / "config.json").read_text())
    match config["model_type"]:
        case "deepseek":
            model = _new_deepseek(config)
            weights = load_file(path / "model.safetensors")
            model.load_state_dict({n: w.float() for n, w in weights.items()})
            return model.eval()
        case "kimi_k2":
            own: Any = DeepseekV3Config.from_dict({k: config[k] for k in config.keys() - _NAMES})
        case _:
            own = AutoConfig.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, config=own, dtype=torch.float32).eval()


def layer_router(model: Any, layer: int) -> tuple[Any, Callable[..., Any]]:
    """A layer's router, and how to call it: (hidden) to (logits, weights, ids)."""
    block = model.model.layers[layer].mlp
    bias = getattr(block, "e_score_correction_bias", None)
    extra = () if bias is None else (bias,)
    return block.gate, lambda z_TD: block.gate(z_TD, *extra)


def router_weights(model: Any, layer: int, z_TD: torch.Tensor) -> torch.Tensor:
    """Weights [T, N] that a layer's router gives."""
    gate, call = layer_router(model, layer)
    _, values, chosen = call(z_TD)
    return torch.zeros(len(z_TD), len(gate.weight)).scatter(1, chosen, values)


def mask_router(model: Any, layer: int, experts: list[int]) -> None:
    """Give a router minus infinity for some experts, before it scores."""
    gate = model.model.layers[layer].mlp.gate
    forward, linear = gate.forward, nn.functional.linear

    def masked(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = linear(x, weight, *rest)
        if weight is gate.weight:
            logits[..., experts] = -torch.inf
        return logits

    def wrapped(*args: Any) -> Any:
        with patch.object(nn.functional, "linear", masked):
            return forward(*args)

    gate.forward = wrapped


@torch.inference_mode()
def our_logits(path: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] of our own forward, layer by layer."""
    decoder = Decoder(open_checkpoint(path), torch.device("cpu"))
    x_BLD = decoder.embedding()[ids_BL]
    for index in range(decoder.layers):
        layer = decoder.layer(index)
        r_BLD = layer.attend(x_BLD, decoder.rotary(*ids_BL.shape))
        x_BLD = r_BLD + layer.feed_forward(layer.normed(r_BLD))
    return decoder.head()(x_BLD.flatten(0, 1)).view(*ids_BL.shape, -1)


@torch.inference_mode()
def reference_logits(path: Path, ids_BL: torch.Tensor, dropped: dict[int, list[int]]) -> Any:
    """Logits [B, L, V] of the whole model, dropped experts masked out."""
    model = load_reference(path)
    for layer, experts in dropped.items():
        if experts:
            mask_router(model, layer, experts)
    return model(ids_BL).logits


def reference_logprobs(
    path: Path, prompts: list[list[int]], dropped: dict[int, list[int]]
) -> list[list[float]]:
    """Log-probability of each prompt token but the first, dropped experts masked out."""
    rows = []
    for prompt in prompts:
        logits = reference_logits(path, torch.tensor([prompt]), dropped)[0].log_softmax(dim=-1)
        rows.append([float(logits[i, t]) for i, t in enumerate(prompt[1:])])
    return rows
