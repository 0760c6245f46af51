"""The command line of an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve.families import FAMILIES
from moe_serve.serving.engine import EngineSpec

ROTARY = '{"custom_ops": ["all", "-rotary_embedding"]}'
LATENT = {
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"),
    *("glm4_moe_lite", "glm_moe_dsa"),
}


def command(folder: Path, config: dict[str, object], *, gpu: bool) -> list[str]:
    """The command for a checkpoint with this config."""
    (folder / "config.json").write_text(json.dumps(config))
    spec = EngineSpec(variant="pruned", model=folder, served_model="m", port=1, log=folder / "log")
    return spec.command(gpu=gpu)


@pytest.mark.parametrize("family", [row.model_type for row in FAMILIES])
def test_the_wrong_rotary_kernel_is_left_out(family: str, tmp_path: Path) -> None:
    """For models with latent attention, on a CPU, compact or not."""
    config: dict[str, object] = {"model_type": family}
    assert (ROTARY in command(tmp_path, config, gpu=False)) == (family in LATENT)
    assert ROTARY not in command(tmp_path, config, gpu=True)


def test_compact_checkpoints_are_loaded_by_the_plugin(tmp_path: Path) -> None:
    """Others by vLLM's own loader."""
    assert "moe_serve" in command(tmp_path, {"compact_experts": {}}, gpu=True)
    assert "--load-format" not in command(tmp_path, {"model_type": "mixtral"}, gpu=True)
