"""The expert layer and the router of compact checkpoints, registered with vLLM's own hook.

Both replace vLLM's classes by name (``PluggableLayer.register_oot``) and behave like them wherever
the model that is being built has no compact table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.platforms import current_platform

from moe_serve_vllm.contract import require_supported
from moe_serve_vllm.errors import UnsupportedSettings, WeightsError
from moe_serve_vllm.remap import Remap, sum_used
from moe_serve_vllm.reports import Selections, counted_tokens, watch
from moe_serve_vllm.support import config_of, read_tables
from moe_serve_vllm.table import LayerTable, skips_padding

_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
SHARDS: Final = ("w1", "w3", "w2")
"""vLLM's names for gate, up and down."""


def is_compact() -> bool:
    """Whether the model that is being built has a compact table."""
    vllm_config = get_current_vllm_config()
    return vllm_config.model_config is not None and "compact_experts" in config_of(vllm_config)


def table_for(prefix: str) -> LayerTable | None:
    """The table of the layer that is being built; ``None`` where nothing changes."""
    if not is_compact():
        return None
    _, tables = read_tables(get_current_vllm_config())
    return tables.get(layer_index(prefix))


class _Drops(nn.Module):
    """Which experts are never selected."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)


@PluggableLayer.register_oot(name="RoutedExperts")
class CompactRoutedExperts(RoutedExperts):
    """Stores M blocks of width b instead of N experts of width I."""

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: FusedMoEConfig,
        quant_config: Any,
        expert_map_manager: ExpertMapManager,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Size the layer by its table, then build it as vLLM does."""
        table = table_for(layer_name)
        if is_compact():
            # Adapters are for attention only; kernels for adapted experts run on GPUs only.
            moe_config.is_lora_enabled = False
        experts = moe_config.num_logical_experts if table is None else len(table.experts)
        if table is not None:
            if expert_map_manager.num_fused_shared_experts:
                raise UnsupportedSettings(
                    layer_name,
                    ["shared experts are fused with the routed ones"],
                    "unset VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS",
                )
            expert_map_manager = _resize(moe_config, table)
        super().__init__(
            layer_name, params_dtype, moe_config, quant_config, expert_map_manager, *args, **kwargs
        )
        self.written: dict[tuple[str, int], int] = {}
        self.stored_blocks = moe_config.num_experts
        self.remapped = table is not None
        reporter, every = watch(get_current_vllm_config()), counted_tokens()
        self.counted = reporter is not None and every > 0
        if reporter is not None and every:
            self.selections = Selections(experts, every)
            reporter.selections[layer_index(layer_name)] = self.selections
        if table is not None:
            if self.quant_method.is_monolithic:
                raise UnsupportedSettings(
                    layer_name,
                    [f"{type(self.quant_method).__name__} routes inside its kernel"],
                    "choose another --moe-backend",
                )
            skipped = skips_padding(
                cuda=current_platform.is_cuda(), backend=self.quant_method.unquantized_backend.name
            )
            self.remap = Remap(table, skipped=skipped)
            self.compute_used = self.remap.padded and current_platform.is_cpu()
            if skipped:
                self._expert_map = table.placement()
                self.global_num_experts = table.blocks + 1

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load as vLLM does, counting what was written where."""
        done = super().weight_loader(
            param, loaded_weight, weight_name, shard_id, expert_id, return_success=True
        )
        if done:
            key = (shard_id, expert_id)
            self.written[key] = self.written.get(key, 0) + 1
        return done if return_success else None

    def load(self, ending: str, shard: str, block: int, weight: torch.Tensor) -> None:
        """Write one matrix of one block."""
        parameter = getattr(self, ending)
        self.weight_loader(parameter, weight, ending, shard, block)

    def unwritten(self) -> list[str]:
        """Blocks that were not written exactly once, in words."""
        found = []
        for block in range(self.stored_blocks):
            for shard in SHARDS:
                times = self.written.get((shard, block), 0)
                if times != 1:
                    found.append(f"{self.layer_name}: block {block} {shard} written {times} times")
        return found

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Replace each selected expert by its blocks."""
        if self.counted:
            self.selections(topk_ids)
        forward = super().forward_modular
        if not self.remapped:
            return forward(x, topk_weights, topk_ids, *args, **kwargs)
        # A compiled graph has the shapes it was traced with.
        if not self.compute_used or torch.compiler.is_compiling():
            topk_ids, topk_weights = self.remap(topk_ids, topk_weights)
            return forward(x, topk_weights, topk_ids, *args, **kwargs)

        def experts(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
            return forward(rows, weights, ids, *args, **kwargs)

        return sum_used(self.remap, x, topk_weights, topk_ids, experts)


# vLLM reads this mark from the loader it is given.
CompactRoutedExperts.weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]


def _resize(moe_config: FusedMoEConfig, table: LayerTable) -> ExpertMapManager:
    """Make one layer's settings those of its blocks; every layer has settings of its own."""
    vllm_config = get_current_vllm_config()
    parallel = moe_config.moe_parallel_config
    moe_config.num_experts = table.blocks
    moe_config.num_local_experts = table.blocks
    moe_config.num_logical_experts = table.blocks
    moe_config.intermediate_size = table.width
    if current_platform.is_cuda():
        # Others route inside the kernel or take no block twice per token.
        moe_config.moe_backend = "triton"
    if require_supported().asks_for_modular:
        moe_config.require_decomposed_backend = True
    moe_config.intermediate_size_per_partition = table.width // parallel.tp_size
    moe_config.intermediate_size_per_partition_unpadded = table.width // parallel.tp_size
    return ExpertMapManager(
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        top_k=moe_config.experts_per_token,
        global_num_experts=table.blocks,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy=vllm_config.parallel_config.expert_placement_strategy,
        enable_eplb=False,
    )


@PluggableLayer.register_oot(name="GateLinear")
class CompactGate(GateLinear):
    """A router whose dropped experts are never selected.

    The mask acts on the logits, whoever calls the router: the model's block or the runner.
    """

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        """Build as vLLM does; remember which experts are dropped."""
        super().__init__(*args, prefix=prefix, **kwargs)
        table = table_for(prefix)
        self.masked = bool(table and table.dropped)
        if table is not None and self.masked:
            mask = torch.zeros(len(table.experts), dtype=torch.bool)
            mask[list(table.dropped)] = True
            self.drops = _Drops(mask)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits, those of dropped experts at the lowest finite value."""
        out = super().forward(x)
        if not self.masked:
            return out
        if isinstance(out, tuple):
            return (self._mask(out[0]), *out[1:])
        return self._mask(out)

    def _mask(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(self.drops.mask, torch.finfo(logits.dtype).min)


def compact_layers(model: nn.Module) -> dict[str, CompactRoutedExperts]:
    """The expert layers of a built model, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompactRoutedExperts)}


def layer_index(name: str) -> int:
    """The decoder layer that a module or tensor belongs to; -1 for none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1


def check_written(model: nn.Module, where: str, note: Callable[[str], None]) -> None:
    """Every block of every layer was written exactly once.

    Raises:
        WeightsError: naming those that were not.
    """
    layers = compact_layers(model).values()
    if problems := [problem for layer in layers for problem in layer.unwritten()]:
        raise WeightsError(where, problems[:8], "the files do not match config.json; prune again")
    note(f"{sum(layer.stored_blocks for layer in layers)} expert blocks written once each")
