"""What the plugin relies on in vLLM, compared with a vLLM's source.

``python -m moe_serve_vllm.contract PATH`` compares an unpacked vLLM, or a wheel, with what
the plugin was written for, and prints what differs; ``scripts/check-vllm VERSION`` downloads the
wheel first. An engine of another version is refused with the same list.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from moe_serve_vllm.clauses import Called, Clause, Holds, Overridden
from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.families import FAMILIES
from moe_serve_vllm.releases import RELEASES, Release, release_of

Read = Callable[[str], str | None]
"""Source of a file by its path within the package; ``None`` where there is none."""

_MOE: Final = "model_executor/layers/fused_moe/"
CONTRACT: Final[tuple[Clause, ...]] = (
    # Registration.
    Holds(
        file="plugins/__init__.py",
        members=("DEFAULT_PLUGINS_GROUP", "STAT_LOGGER_PLUGINS_GROUP"),
    ),
    Holds(file="version.py", members=("__version__",)),
    Called(file="logger.py", name="init_logger", arguments=("name",)),
    Holds(file="model_executor/models/registry.py", members=("ModelRegistry",)),
    Called(
        file="model_executor/models/registry.py",
        name="_ModelRegistry.register_model",
        arguments=("model_arch", "model_cls"),
    ),
    Called(
        file="model_executor/models/registry.py",
        name="_ModelRegistry.get_supported_archs",
    ),
    Called(
        file="model_executor/model_loader/__init__.py",
        name="register_model_loader",
        arguments=("load_format",),
    ),
    Called(
        file="model_executor/custom_op.py",
        name="PluggableLayer.register_oot",
        arguments=("name",),
    ),
    # The loader.
    Overridden(
        file="model_executor/model_loader/default_loader.py",
        name="DefaultModelLoader.__init__",
        parameters=("load_config",),
    ),
    Overridden(
        file="model_executor/model_loader/default_loader.py",
        name="DefaultModelLoader.load_weights",
        parameters=("model", "model_config"),
    ),
    Overridden(
        file="model_executor/model_loader/default_loader.py",
        name="DefaultModelLoader.download_model",
        parameters=("model_config",),
    ),
    Called(
        file="model_executor/model_loader/default_loader.py",
        name="DefaultModelLoader.get_all_weights",
        arguments=("model_config", "model"),
    ),
    # The expert layer.
    Called(file="config/vllm.py", name="get_current_vllm_config"),
    Holds(
        file=f"{_MOE}config.py",
        name="FusedMoEConfig",
        members=(
            "num_experts",
            "num_local_experts",
            "num_logical_experts",
            "intermediate_size",
            "intermediate_size_per_partition",
            "intermediate_size_per_partition_unpadded",
            "experts_per_token",
            "moe_parallel_config",
            "moe_backend",
            "is_lora_enabled",
        ),
    ),
    Holds(file=f"{_MOE}config.py", name="FusedMoEParallelConfig", members=("tp_size",)),
    Holds(
        file=f"{_MOE}expert_map_manager.py",
        name="ExpertMapManager",
        members=("num_fused_shared_experts",),
    ),
    Called(
        file=f"{_MOE}expert_map_manager.py",
        name="ExpertMapManager.__init__",
        arguments=(
            "max_num_batched_tokens",
            "top_k",
            "global_num_experts",
            "num_redundant_experts",
            "num_expert_group",
            "moe_parallel_config",
            "placement_strategy",
            "enable_eplb",
        ),
    ),
    Called(
        file=f"{_MOE}routed_experts.py",
        name="RoutedExperts.__init__",
        arguments=(
            "layer_name",
            "params_dtype",
            "moe_config",
            "quant_config",
            "expert_map_manager",
        ),
    ),
    Holds(
        file=f"{_MOE}routed_experts.py",
        name="RoutedExperts",
        members=(
            "quant_method",
            "layer_name",
            "expert_map",
            "_expert_map",
            "global_num_experts",
        ),
    ),
    Overridden(
        file=f"{_MOE}routed_experts.py",
        name="RoutedExperts.weight_loader",
        parameters=(
            "param",
            "loaded_weight",
            "weight_name",
            "shard_id",
            "expert_id",
            "return_success",
        ),
    ),
    Overridden(
        file=f"{_MOE}routed_experts.py",
        name="RoutedExperts.forward_modular",
        parameters=(
            "x",
            "topk_weights",
            "topk_ids",
            "shared_experts",
            "shared_experts_input",
        ),
    ),
    Holds(
        file=f"{_MOE}fused_moe_method_base.py",
        name="FusedMoEMethodBase",
        members=("is_monolithic",),
    ),
    Holds(
        file=f"{_MOE}unquantized_fused_moe_method.py",
        name="UnquantizedFusedMoEMethod",
        members=("unquantized_backend", "w13_weight", "w2_weight"),
    ),
    Holds(file=f"{_MOE}oracle/unquantized.py", name="UnquantizedMoeBackend", members=("TRITON",)),
    # The router.
    Overridden(file=f"{_MOE}router/gate_linear.py", name="GateLinear.forward", parameters=("x",)),
    Called(
        file=f"{_MOE}router/gate_linear.py",
        name="GateLinear.__init__",
        arguments=("input_size", "output_size", "prefix"),
    ),
    # What is reported.
    Overridden(
        file="v1/metrics/loggers.py",
        name="StatLoggerBase.__init__",
        parameters=("vllm_config", "engine_index"),
    ),
    Overridden(
        file="v1/metrics/loggers.py",
        name="StatLoggerBase.record",
        parameters=("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Overridden(
        file="v1/metrics/loggers.py",
        name="StatLoggerBase.log_engine_initialized",
        parameters=(),
    ),
    Holds(
        file="config/compilation.py",
        name="CompilationConfig",
        members=("static_forward_context",),
    ),
    Holds(file="config/cache.py", name="CacheConfig", members=("num_gpu_blocks", "block_size")),
    Holds(
        file="config/model.py",
        name="ModelConfig",
        members=("model", "hf_config", "served_model_name"),
    ),
    Holds(
        file="model_executor/layers/attention/attention.py", name="Attention", members=("kv_cache",)
    ),
    # What is refused.
    Holds(
        file="config/parallel.py",
        name="ParallelConfig",
        members=(
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "enable_expert_parallel",
            "data_parallel_size",
            "enable_eplb",
            "use_sequence_parallel_moe",
            "prefill_context_parallel_size",
            "expert_placement_strategy",
        ),
    ),
    Holds(
        file="config/load.py",
        name="LoadConfig",
        members=("load_format", "model_loader_extra_config"),
    ),
    Holds(file="config/lora.py", name="LoRAConfig", members=("target_modules",)),
    Holds(file="config/scheduler.py", name="SchedulerConfig", members=("max_num_batched_tokens",)),
    Holds(file="config/compilation.py", name="CompilationConfig", members=("custom_ops", "mode")),
    Holds(file="config/compilation.py", name="CompilationMode", members=("NONE",)),
    Holds(file="config/kernel.py", name="KernelConfig", members=("moe_backend",)),
    Holds(
        file="config/vllm.py",
        name="VllmConfig",
        members=(
            "model_config",
            "load_config",
            "parallel_config",
            "scheduler_config",
            "cache_config",
            "compilation_config",
            "quant_config",
            "lora_config",
            "speculative_config",
            "kernel_config",
        ),
    ),
    Holds(file="platforms/__init__.py", members=("current_platform",)),
    Holds(
        file="platforms/interface.py", name="Platform", members=("is_cpu", "is_cuda", "device_name")
    ),
    # What an engine that can sleep is asked over HTTP.
    *(
        Called(file="entrypoints/serve/dev/sleep/api_router.py", name=name, arguments=arguments)
        for name, arguments in (
            ("sleep", ("raw_request", "level", "mode")),
            ("wake_up", ("raw_request",)),
            ("is_sleeping", ("raw_request",)),
        )
    ),
    # The models.
    *(
        clause
        for module, name in (family.stock.split(":") for family in FAMILIES)
        for clause in (
            Holds(file=f"model_executor/models/{module}.py", name=name),
            Called(
                file=f"model_executor/models/{module}.py",
                name=f"{name}.__init__",
                arguments=("vllm_config", "prefix"),
            ),
            Called(
                file=f"model_executor/models/{module}.py",
                name=f"{name}.load_weights",
                arguments=("weights",),
            ),
        )
    ),
)


_MODULAR: Final = Holds(
    file=f"{_MOE}config.py", name="FusedMoEConfig", members=("require_decomposed_backend",)
)


def clauses_for(release: Release | None) -> tuple[Clause, ...]:
    """What is relied on in a release; an unknown version is compared with the newest one."""
    asks = (release or RELEASES[-1]).asks_for_modular
    return (*CONTRACT, _MODULAR) if asks else CONTRACT


def version_of(read: Read) -> str:
    """The version that a vLLM's sources state; empty where they don't."""
    found = re.search(r"^__version__ = .*'(.+)'$", read("_version.py") or "", re.MULTILINE)
    return found[1] if found else ""


def differences(read: Read) -> list[str]:
    """What is not as the plugin expects, one line for each.

    Args:
        read: gives the source of a file of the vLLM in question.
    """
    found: list[str] = []
    trees: dict[str, ast.Module | None] = {}
    for clause in clauses_for(release_of(version_of(read))):
        if clause.file not in trees:
            source = read(clause.file)
            trees[clause.file] = None if source is None else ast.parse(source)
            if source is None:
                found.append(f"vllm/{clause.file} is gone")
        tree = trees[clause.file]
        if tree is not None and (difference := clause.difference(tree)) is not None:
            found.append(f"vllm/{clause.file}: {difference}")
    return found


def require_supported() -> Release:
    """The installed vLLM's release.

    One that the tests don't run with is compared again, for its patches may differ.

    Raises:
        UnsupportedSettings: the version is unknown, or differs; listing what.
    """
    import vllm

    release = release_of(vllm.__version__)
    if release is not None and release.tested:
        return release
    found = _installed(Path(vllm.__path__[0]))
    if release is not None and not found:
        return release
    known = ", ".join(f"{r.series}.x" for r in RELEASES)
    raise UnsupportedSettings(
        f"vLLM {vllm.__version__}",
        [f"made for {known}", *(found or ["nothing the plugin relies on has changed"])],
        "install one of these versions, or a plugin made for this one",
    )


@cache
def _installed(package: Path) -> list[str]:
    """Read once per process: every layer asks."""
    return differences(from_directory(package))


def from_directory(package: Path) -> Read:
    """Sources of an installed or unpacked ``vllm`` package."""
    return lambda file: (package / file).read_text() if (package / file).is_file() else None


def from_wheel(wheel: zipfile.ZipFile) -> Read:
    """Sources of a wheel, not unpacked."""
    names = set(wheel.namelist())
    return lambda file: wheel.read(f"vllm/{file}").decode() if f"vllm/{file}" in names else None


def main(arguments: Sequence[str]) -> int:
    """Print the differences; 0 where there are none, 1 otherwise, 2 without a vLLM to read."""
    path = Path(arguments[0]) if len(arguments) == 1 else Path()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return _compare(from_wheel(wheel))
    if (path / "model_executor").is_dir():
        return _compare(from_directory(path))
    sys.stderr.write("contract: give a vLLM wheel or an unpacked vllm directory\n")
    return 2


def _compare(read: Read) -> int:
    found, version = differences(read), version_of(read)
    release = release_of(version)
    for line in found:
        print(line)
    print(
        f"vLLM {version or 'of unknown version'}: {len(found)} differences in "
        f"{len(clauses_for(release))} clauses; "
        + ("unknown to the plugin, refused" if release is None else _status(release))
    )
    return 1 if found else 0


def _status(release: Release) -> str:
    return "the tests run with it" if release.tested else "compared by its source, never run"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
