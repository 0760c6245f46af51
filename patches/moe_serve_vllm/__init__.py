"""A vLLM plugin that serves compact Mixture-of-Experts checkpoints.

vLLM finds :func:`register` through the entry-point group ``vllm.general_plugins`` and calls it in
every process. Nothing in vLLM is edited: models, the expert layer and the loader are registered
through its own extension points. Imports the standard library, vLLM and what it brings: torch,
transformers and prometheus_client.
"""

from __future__ import annotations


def register() -> None:
    """Make the compact architectures and ``--load-format moe_serve`` known. Repeatable.

    vLLM only logs what a plugin raises here, so everything is refused again when the model is
    built; an unsupported version with what differs in it, before anything of it is imported.
    """
    from vllm import ModelRegistry

    from moe_serve_vllm.configs import register_configs
    from moe_serve_vllm.contract import require_supported
    from moe_serve_vllm.families import FAMILIES

    register_configs()
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES:
        if family.architecture not in known:
            name = family.architecture
            ModelRegistry.register_model(name, f"moe_serve_vllm.models:{name}")
    require_supported()
    from moe_serve_vllm.loader import register_loader

    register_loader()
