"""What the plugin relies on in vLLM, read from source without importing it.

``python -m moe_serve_vllm.contract PATH`` compares an unpacked vLLM, or a wheel, with what
the plugin was written for, and prints what differs; ``scripts/check-vllm VERSION`` downloads the
wheel first. An engine of another version is refused with the same list.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.families import FAMILIES

SUPPORTED: Final = ("0.32.",)
"""vLLM versions this plugin was tested with."""

Read = Callable[[str], str | None]
"""Source of a file by its path within the package; ``None`` where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Called:
    """A function we call: it takes our arguments and asks for no others."""

    file: str
    name: str
    arguments: tuple[str, ...] = ()

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        function = _function(tree, self.name)
        if function is None:
            return f"{self.name} is gone"
        taken, required = _parameters(function)
        if lacking := [a for a in self.arguments if a not in taken]:
            return f"{self.name} takes no {', '.join(lacking)}"
        if more := [a for a in required if a not in self.arguments]:
            return f"{self.name} also requires {', '.join(more)}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overridden:
    """A method we override: its parameters are exactly those we hand on."""

    file: str
    name: str
    parameters: tuple[str, ...]

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        function = _function(tree, self.name)
        if function is None:
            return f"{self.name} is gone"
        taken, _ = _parameters(function)
        if tuple(taken) != self.parameters:
            return f"{self.name} takes ({', '.join(taken)}), not ({', '.join(self.parameters)})"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holds:
    """Names that a class (or, without one, the module) defines."""

    file: str
    name: str = ""
    members: tuple[str, ...] = ()

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        scope = _scope(tree, self.name)
        if scope is None:
            return f"{self.name} is gone"
        there = _defined(scope)
        if lacking := [m for m in self.members if m not in there]:
            return f"{self.name or self.file} has no {', '.join(lacking)}"
        return None


Clause = Called | Overridden | Holds

_MOE: Final = "model_executor/layers/fused_moe/"
CONTRACT: Final[tuple[Clause, ...]] = (
    # Registration.
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
        ),
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
        members=("unquantized_backend",),
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
    Holds(file="config/model.py", name="ModelConfig", members=("served_model_name",)),
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
    Holds(file="config/scheduler.py", name="SchedulerConfig", members=("max_num_batched_tokens",)),
    Holds(file="config/compilation.py", name="CompilationConfig", members=("custom_ops",)),
    Holds(file="config/kernel.py", name="KernelConfig", members=("moe_backend",)),
    Holds(
        file="config/vllm.py",
        name="VllmConfig",
        members=(
            "model_config",
            "quant_config",
            "lora_config",
            "speculative_config",
            "kernel_config",
        ),
    ),
    Holds(file="platforms/interface.py", name="Platform", members=("is_cpu", "is_cuda")),
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


def differences(read: Read) -> list[str]:
    """What is not as the plugin expects, one line for each.

    Args:
        read: gives the source of a file of the vLLM in question.
    """
    found: list[str] = []
    trees: dict[str, ast.Module | None] = {}
    for clause in CONTRACT:
        if clause.file not in trees:
            source = read(clause.file)
            trees[clause.file] = None if source is None else ast.parse(source)
            if source is None:
                found.append(f"vllm/{clause.file} is gone")
        tree = trees[clause.file]
        if tree is not None and (difference := clause.difference(tree)) is not None:
            found.append(f"vllm/{clause.file}: {difference}")
    return found


def require_supported() -> None:
    """Refuse a vLLM that the plugin was not tested with.

    Raises:
        UnsupportedSettings: listing what differs in the installed one.
    """
    import vllm

    if vllm.__version__.startswith(SUPPORTED):
        return
    found = differences(from_directory(Path(vllm.__path__[0])))
    tested = ", ".join(f"{version}x" for version in SUPPORTED)
    raise UnsupportedSettings(
        f"vLLM {vllm.__version__}",
        [f"tested with {tested}", *(found or ["nothing the plugin relies on has changed"])],
        "install a tested version, or a plugin tested with this one",
    )


def from_directory(package: Path) -> Read:
    """Sources of an installed or unpacked ``vllm`` package."""
    return lambda file: (package / file).read_text() if (package / file).is_file() else None


def from_wheel(wheel: zipfile.ZipFile) -> Read:
    """Sources of a wheel, not unpacked."""
    names = set(wheel.namelist())
    return lambda file: wheel.read(f"vllm/{file}").decode() if f"vllm/{file}" in names else None


def _scope(tree: ast.Module, name: str) -> ast.Module | ast.ClassDef | None:
    if not name:
        return tree
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """A function or method; of overloads the last, and where absent that of a base class here."""
    owner, _, last = name.rpartition(".")
    scope = _scope(tree, owner)
    if scope is None:
        return None
    here = [n for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == last]
    if here:
        return here[-1]
    bases = scope.bases if isinstance(scope, ast.ClassDef) else []
    inherited = (_function(tree, f"{b.id}.{last}") for b in bases if isinstance(b, ast.Name))
    return next((function for function in inherited if function is not None), None)


def _parameters(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """All parameters but ``self`` and ``cls``, and those without a default."""
    arguments = function.args
    places = [*arguments.posonlyargs, *arguments.args]
    bare = places[: len(places) - len(arguments.defaults)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = [*bare, *(a for a, default in keywords if default is None)]
    all_of_them = [*places, *arguments.kwonlyargs]
    return (
        [a.arg for a in all_of_them if a.arg not in ("self", "cls")],
        [a.arg for a in required if a.arg not in ("self", "cls")],
    )


def _defined(scope: ast.Module | ast.ClassDef) -> set[str]:
    """Names a class or module defines: functions, what is assigned, and buffers."""
    names: set[str] = set()
    for node in ast.walk(scope):
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Call(
                func=ast.Attribute(attr="register_buffer"), args=[ast.Constant(value=str(name)), *_]
            ):
                names.add(name)
    return names


def main(arguments: Sequence[str]) -> int:
    """Print the differences; 0 where there are none, 1 otherwise, 2 without a vLLM to read."""
    path = Path(arguments[0]) if len(arguments) == 1 else Path()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            found = differences(from_wheel(wheel))
    elif (path / "model_executor").is_dir():
        found = differences(from_directory(path))
    else:
        sys.stderr.write("contract: give a vLLM wheel or an unpacked vllm directory\n")
        return 2
    for line in found:
        print(line)
    print(f"{path.name}: {len(found)} differences, {len(CONTRACT)} clauses")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
