"""Settings that don't go with compact experts, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_serve_vllm import support
from moe_serve_vllm.errors import UnsupportedSettings
from tests.support.fuzz import sound


def settings(**changes: Any) -> Any:
    """An engine's settings as vLLM holds them, none of which is refused, with some changed."""
    config, _ = sound()
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": False,
        "data_parallel_size": 1,
        "enable_eplb": False,
        "use_sequence_parallel_moe": False,
        "prefill_context_parallel_size": 1,
    }
    values: dict[str, Any] = {
        "model_config": SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: dict(config))),
        "load_config": SimpleNamespace(load_format="moe_serve"),
        "kernel_config": SimpleNamespace(moe_backend="auto"),
        "compilation_config": SimpleNamespace(custom_ops=[], mode=0),
        "lora_config": None,
        "quant_config": None,
        "speculative_config": None,
    }
    for key in changes.keys() & config.keys():
        config[key] = changes.pop(key)
    parallel |= {key: changes.pop(key) for key in changes.keys() & parallel.keys()}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **(values | changes))


def on(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Pretend to be on a platform."""
    pretended = SimpleNamespace(
        is_cpu=lambda: platform == "cpu",
        is_cuda=lambda: platform == "cuda",
        device_name=platform,
    )
    monkeypatch.setattr(support, "current_platform", pretended)


def refusal(vllm_config: Any) -> str:
    """What the plugin says."""
    with pytest.raises(UnsupportedSettings) as caught:
        support.check(vllm_config)
    return str(caught.value)


def test_vllm_has_no_sleep_mode_on_a_cpu() -> None:
    """Which is why ``up --share-gpu`` is refused there; its endpoints would do nothing."""
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()
    assert not current_platform.is_sleep_mode_available()


def test_plain_settings_are_taken() -> None:
    """Nothing to refuse."""
    support.check(settings())


def test_quantised_weights_are_refused_by_name() -> None:
    """With whatever else stands in the way, in one message."""
    fp8 = SimpleNamespace(get_name=lambda: "fp8")
    told = refusal(settings(quant_config=fp8, enable_eplb=True, data_parallel_size=2))
    for words in ("fp8 weights, only unquantised ones", "--enable-eplb", "--data-parallel"):
        assert words in told


def test_adapters_are_for_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM wraps the modules named; without names all, experts and routers too."""

    def lora(*names: str) -> Any:
        return SimpleNamespace(target_modules=list(names) or None)

    support.check(settings(lora_config=lora("q_proj", "o_proj")))
    for more in (lora(), lora("q_proj", "gate"), lora("experts")):
        assert "--lora-target-modules" in refusal(settings(lora_config=more))
    on(monkeypatch, "cuda")
    config, _ = sound()
    config |= {"architectures": ["CompactGlm4MoeLiteForCausalLM"]}
    config["n_routed_experts"] = config["num_experts"]
    hf_config = SimpleNamespace(to_dict=lambda: dict(config))
    latent = SimpleNamespace(hf_config=hf_config)
    told = refusal(settings(model_config=latent, lora_config=lora("q_proj")))
    assert "adapters for latent attention" in told


def test_blocks_that_ranks_cannot_share_are_refused() -> None:
    """Blocks of 32 neurons on two ranks would be 16 each; layer 1 is the one with a table."""
    assert "--tensor-parallel-size 2 (blocks of layers [1]" in refusal(
        settings(tensor_parallel_size=2)
    )


def test_latent_attention_needs_the_rotary_option_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The option to add is in the message; on CUDA nothing is refused."""
    names: dict[str, Any] = {"architectures": ["CompactGlm4MoeLiteForCausalLM"]}
    config, _ = sound()
    config |= names | {"n_routed_experts": config["num_experts"]}

    def latent(**changes: Any) -> Any:
        hf_config = SimpleNamespace(to_dict=lambda: dict(config))
        return settings(model_config=SimpleNamespace(hf_config=hf_config), **changes)

    on(monkeypatch, "cpu")
    assert support.ROTARY_OPTION in refusal(latent())
    option = SimpleNamespace(custom_ops=["all", "-rotary_embedding"], mode=0)
    support.check(latent(compilation_config=option))
    on(monkeypatch, "cuda")
    support.check(latent())


def test_stages_need_a_traced_model_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock vLLM fails at the first request there; the options to add are in the message."""
    on(monkeypatch, "cpu")
    assert support.STAGES_OPTION in refusal(settings(pipeline_parallel_size=2))
    traced = SimpleNamespace(custom_ops=[], mode=2)
    support.check(settings(pipeline_parallel_size=2, compilation_config=traced))
    on(monkeypatch, "cuda")
    support.check(settings(pipeline_parallel_size=2))


def test_other_kernels_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that route inside the kernel don't know the remapping."""
    backend = SimpleNamespace(moe_backend="flashinfer_trtllm")
    on(monkeypatch, "cuda")
    assert "--moe-backend flashinfer_trtllm" in refusal(settings(kernel_config=backend))
    on(monkeypatch, "cpu")
    support.check(settings(kernel_config=backend))


def test_what_was_not_tried_is_no_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for other GPUs may take no block twice for one token."""
    on(monkeypatch, "rocm")
    assert "rocm, only processors and NVIDIA GPUs" in refusal(settings())


def test_more_blocks_than_a_gpu_sorts_are_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """992 blocks and the id for none round up to 1024, which vLLM's kernel does not take."""

    def table(blocks: int) -> Any:
        lists = [list(range(8 * e, min(8 * e + 8, blocks))) for e in range(-(-blocks // 8))]
        layer = {"width": 32, "blocks": blocks, "experts": lists}
        compact = {"version": 1, "layers": {"1": layer}}
        return settings(num_experts=len(lists), compact_experts=compact)

    on(monkeypatch, "cuda")
    support.check(table(991))
    assert "more than 991 blocks in a layer on a GPU (layers [1])" in refusal(table(992))
    on(monkeypatch, "cpu")
    support.check(table(992))
