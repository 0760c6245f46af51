"""Configs that transformers has no class for: published with code, which is never run."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    """DeepSeek-MoE, arXiv 2401.06066. vLLM has its model; the values are the checkpoint's own.

    Below is what holds where it names none.
    """

    model_type = "deepseek"
    hidden_act = "silu"
    rms_norm_eps = 1e-6
    norm_topk_prob = False


def register_configs() -> None:
    """Make them known to transformers, which vLLM asks. Repeatable."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
