"""The command line of an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve.errors import ServingError
from moe_serve.families import FAMILIES
from moe_serve.progress import Silent
from moe_serve.serving import engine, ports, process, stack, twin
from moe_serve.serving.config import StackConfig
from moe_serve.serving.engine import EngineSpec, require_servable
from tests.support.models import change_config, make_model

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
    """For models with latent attention, on a CPU, compact or not.

    So is the attention kernel for BF16 alone that vLLM takes where the processor has AMX.
    """
    config: dict[str, object] = {"model_type": family}
    on_cpu, on_gpu = (command(tmp_path, config, gpu=gpu) for gpu in (False, True))
    assert (ROTARY in on_cpu) == ("CPU_MLA" in on_cpu) == (family in LATENT)
    assert not {ROTARY, "CPU_MLA"} & set(on_gpu)


def test_what_is_asked_all_the_time_is_not_logged(tmp_path: Path) -> None:
    """By an option that this vLLM has, and that the user's own comes after."""
    (tmp_path / "config.json").write_text("{}")
    option, mine = "--disable-access-log-for-endpoints", ("--disable-access-log-for-endpoints", "/")
    spec = EngineSpec(
        variant="pruned", model=tmp_path, served_model="m", port=1, log=tmp_path, arguments=mine
    )
    found = spec.command(gpu=True)
    unlogged = found[found.index(option) + 1].split(",")
    assert {"/health", "/metrics"} <= set(unlogged)
    assert tuple(found[-2:]) == mine
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    assert hasattr(FrontendArgs, option.removeprefix("--").replace("-", "_"))


def test_an_engine_that_sleeps_counts_no_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was exported: its counters would be read while their memory is given up."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(engine, "start", lambda _n, _c, _l, given, **_: found.append(given))
    (tmp_path / "config.json").write_text("{}")
    for sleeps in (True, False):
        EngineSpec(
            variant="original",
            model=tmp_path,
            served_model="m",
            port=1,
            log=tmp_path,
            sleeps=sleeps,
        ).launch(gpu=True)
    counted = [given.get("MOE_SERVE_EXPERT_SELECTIONS") for given in found]
    assert counted == ["0", None]


def test_compact_checkpoints_are_loaded_by_the_plugin(tmp_path: Path) -> None:
    """Others by vLLM's own loader."""
    assert "moe_serve" in command(tmp_path, {"compact_experts": {}}, gpu=True)
    assert "--load-format" not in command(tmp_path, {"model_type": "mixtral"}, gpu=True)


@pytest.mark.parametrize("family", [row.model_type for row in FAMILIES])
def test_what_the_cpu_gets_wrong_needs_a_gpu(family: str, tmp_path: Path) -> None:
    """With the reason; the compact form needs a row of the plugin's besides, wherever it runs."""
    keys = {row.model_type: dict(row.vllm_keys) for row in FAMILIES}[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | keys))
    require_servable(tmp_path, gpu=True)
    wrong = {"ernie4_5_moe": "bias", "minimax_m2": "router", "deepseek_v32": "sparse attention"}
    wrong["glm_moe_dsa"] = wrong["deepseek_v32"]
    if family in wrong:
        with pytest.raises(ServingError, match=f"{wrong[family]}.*; serve it on a GPU"):
            require_servable(tmp_path, gpu=False)
    else:
        require_servable(tmp_path, gpu=False)
    change_config(tmp_path, compact_experts={})
    if family in {row.model_type for row in FAMILIES if row.served}:
        require_servable(tmp_path, gpu=True)
    else:
        with pytest.raises(ServingError, match="no row for the compact form"):
            require_servable(tmp_path, gpu=True)


def test_what_vllm_would_build_otherwise_is_refused(tmp_path: Path) -> None:
    """A DeepSeek-V3 that transformers has saved: softmax and no bias where it scores by sigmoid."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    with pytest.raises(ServingError, match=r'say "topk_method": "noaux_tc" and .*; add that'):
        require_servable(tmp_path, gpu=False)
    change_config(tmp_path, topk_method="noaux_tc", scoring_func="sigmoid")
    require_servable(tmp_path, gpu=False)


def test_a_checkpoint_of_a_model_without_a_row_is_left_to_vllm(tmp_path: Path) -> None:
    """It may know it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    require_servable(tmp_path, gpu=False)


def test_nothing_starts_where_answers_would_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``up`` on ERNIE 4.5 beside a model that could be served, ``verify --engine`` on ERNIE."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError

    for module in (engine, stack, process):
        monkeypatch.setattr(module, "start", start)
    for module in (stack, twin):
        monkeypatch.setattr(module, "has_gpu", lambda: False)
    ernie = make_model(tmp_path / "ernie", "ernie4_5_moe")
    sound = make_model(tmp_path / "sound", "qwen3_moe")
    config = StackConfig(
        original=sound,
        pruned=ernie,
        state=tmp_path / "state",
        port=ports.free_port(),
        control_port=ports.free_port(),
    )
    told: list[str] = []
    with pytest.raises(ServingError, match="processor leaves out the bias"):
        stack.bring_up(config, told.append)
    assert told == []
    with pytest.raises(ServingError, match="verify without --engine need no vLLM"):
        twin.compare_with_twin(ernie, Silent())
