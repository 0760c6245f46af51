"""The compact architectures: vLLM's own models, refused or built, with our layers inside.

Importing this module registers the layers, so it must happen before a model is built; vLLM imports
it when it looks up the architecture.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from moe_serve_vllm import layers
from moe_serve_vllm.support import check

__all__ = [
    "CompactGlm4MoeForCausalLM",
    "CompactMixtralForCausalLM",
    "CompactOlmoeForCausalLM",
    "CompactQwen2MoeForCausalLM",
    "CompactQwen3MoeForCausalLM",
    "layers",
]


class CompactMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral with stored blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what can't be served, then build."""
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class CompactQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE with stored blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what can't be served, then build."""
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class CompactGlm4MoeForCausalLM(Glm4MoeForCausalLM):
    """GLM-4-MoE with stored blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what can't be served, then build."""
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class CompactOlmoeForCausalLM(OlmoeForCausalLM):
    """OLMoE with stored blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what can't be served, then build."""
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class CompactQwen2MoeForCausalLM(Qwen2MoeForCausalLM):
    """Qwen2-MoE with stored blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what can't be served, then build."""
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
