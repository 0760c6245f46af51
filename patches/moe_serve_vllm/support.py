"""Engine settings that compact experts don't support, found all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.config import CompilationMode
from vllm.platforms import current_platform

from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.families import ServedFamily
from moe_serve_vllm.table import MOST_SORTED, WIDTH_MULTIPLE, LayerTable, tables_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOAD_FORMAT: Final = "moe_serve"
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
"""What adapters may change."""
ROTARY_OPTION: Final = """--compilation-config '{"custom_ops": ["all", "-rotary_embedding"]}'"""
STAGES_OPTION: Final = (
    """--no-enforce-eager --compilation-config '{"mode": 2, "backend": "eager"}'"""
)
"""Traced once and run as it is: vLLM makes the buffer between two stages while it warms that up."""


def read_tables(vllm_config: VllmConfig) -> tuple[ServedFamily, dict[int, LayerTable]]:
    """The family and the checked table of the model that is being built.

    Raises:
        TableError: the table is damaged.
    """
    return tables_of(config_of(vllm_config))


def config_of(vllm_config: VllmConfig) -> dict[str, Any]:
    """The checkpoint's config as a dictionary."""
    hf_config = vllm_config.model_config.hf_config
    config: dict[str, Any] = hf_config.to_dict()
    for key in ("num_experts", "num_local_experts"):
        # transformers may store one of the two under an attribute alias only.
        if key not in config and hasattr(hf_config, key):
            config[key] = getattr(hf_config, key)
    return config


def check(vllm_config: VllmConfig) -> None:
    """Refuse to build what would be served wrongly.

    Raises:
        UnsupportedSettings: listing every setting that stands in the way.
        TableError: the table is damaged.
    """
    family, tables = read_tables(vllm_config)
    parallel = vllm_config.parallel_config
    backend = vllm_config.kernel_config.moe_backend
    tp = parallel.tensor_parallel_size
    narrow = [i for i, t in tables.items() if tp > 1 and t.width % (tp * WIDTH_MULTIPLE)]
    crowded = [i for i, t in tables.items() if t.blocks > MOST_SORTED]
    tried = current_platform.is_cpu() or current_platform.is_cuda()
    wishes = {
        f"{current_platform.device_name}, only processors and NVIDIA GPUs": not tried,
        f"--load-format {vllm_config.load_config.load_format}, "
        f"it must be {LOAD_FORMAT}": vllm_config.load_config.load_format != LOAD_FORMAT,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        "--pipeline-parallel-size above 1 and --enforce-eager on a processor, where vLLM then "
        f"has no room for what one stage hands to the next; add {STAGES_OPTION}": (
            parallel.pipeline_parallel_size > 1
            and current_platform.is_cpu()
            and vllm_config.compilation_config.mode == CompilationMode.NONE
        ),
        "--enable-eplb": parallel.enable_eplb,
        "sequence parallelism for experts": parallel.use_sequence_parallel_moe,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "adapters for more than attention (--enable-lora); name some of "
        f"{' '.join(ATTENTION)} after --lora-target-modules": _adapts_more(vllm_config),
        "adapters for latent attention (--enable-lora)": (
            vllm_config.lora_config is not None and family.latent_attention
        ),
        f"{_quantisation(vllm_config)} weights, only unquantised ones: vLLM's kernels for "
        "quantised experts need a GPU, or a processor with AMX, and were not tried on blocks; "
        "serve the form that moe-serve export --format tied writes": vllm_config.quant_config
        is not None,
        f"vLLM's rotary kernel for CPUs, which is wrong for this model; add {ROTARY_OPTION}": (
            family.latent_attention
            and current_platform.is_cpu()
            and "-rotary_embedding" not in vllm_config.compilation_config.custom_ops
        ),
        f"--moe-backend {backend}, only triton on CUDA": (
            current_platform.is_cuda() and backend not in ("auto", "triton")
        ),
        f"more than {MOST_SORTED} blocks in a layer on a GPU (layers {crowded}), which its kernels "
        "can't sort; prune with a wider --block-width": bool(crowded)
        and current_platform.is_cuda(),
        "speculative decoding": vllm_config.speculative_config is not None,
        f"--tensor-parallel-size {tp} (blocks of layers {narrow} can't be cut into multiples of "
        f"{WIDTH_MULTIPLE})": bool(narrow),
    }
    if problems := [wish for wish, wanted in wishes.items() if wanted]:
        raise UnsupportedSettings(
            "compact experts are not served with", problems, "change these settings"
        )


def _adapts_more(vllm_config: VllmConfig) -> bool:
    """Whether LoRA could reach a router or an expert; vLLM wraps only the modules it is told."""
    lora = vllm_config.lora_config
    return lora is not None and not (
        lora.target_modules and set(lora.target_modules) <= set(ATTENTION)
    )


def _quantisation(vllm_config: VllmConfig) -> str:
    """The name of the quantisation, for the refusal."""
    quant_config = vllm_config.quant_config
    return "" if quant_config is None else str(quant_config.get_name())
