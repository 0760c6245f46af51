"""What the plugin relies on in vLLM, and what happens when it is not there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import vllm

from moe_serve_vllm import models
from moe_serve_vllm.contract import (
    CONTRACT,
    differences,
    from_directory,
    from_wheel,
    main,
    require_supported,
)
from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.families import FAMILIES

PACKAGE = Path(vllm.__path__[0])
LAYER = "model_executor/layers/fused_moe/routed_experts.py"
INSTALLED = from_directory(PACKAGE)


def changed(file: str, old: str, new: str) -> list[str]:
    """Differences when one line of one file is another."""

    def read(name: str) -> str | None:
        source = INSTALLED(name)
        if source is None or name != file:
            return source
        assert old in source
        return source.replace(old, new)

    return differences(read)


def test_the_installed_version_is_as_expected() -> None:
    """Every clause holds, and every served model is among them."""
    assert differences(INSTALLED) == []
    named = {clause.name for clause in CONTRACT}
    assert {family.stock.partition(":")[2] for family in FAMILIES} <= named


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            LAYER,
            "def forward_modular",
            "def forward_split",
            "RoutedExperts.forward_modular is gone",
        ),
        (LAYER, "topk_ids: torch.Tensor,", "ids: torch.Tensor,", "not (x, topk_weights, topk_ids,"),
        (
            "model_executor/layers/fused_moe/expert_map_manager.py",
            "        top_k: int,\n",
            "        top_k: int,\n        ranks: int,\n",
            "ExpertMapManager.__init__ also requires ranks",
        ),
        (
            "model_executor/layers/fused_moe/config.py",
            "    num_local_experts: int\n",
            "",
            "FusedMoEConfig has no num_local_experts",
        ),
        (
            "model_executor/models/olmoe.py",
            "class OlmoeForCausalLM",
            "class Olmoe",
            "OlmoeForCausalLM is gone",
        ),
    ],
)
def test_a_change_is_named(file: str, old: str, new: str, words: str) -> None:
    """With the file it is in."""
    found = changed(file, old, new)
    assert any(line.startswith(f"vllm/{file}: ") and words in line for line in found), found


def test_a_file_that_is_gone_is_named_once() -> None:
    """Not once for each thing that was in it."""
    found = differences(lambda name: None if name == LAYER else INSTALLED(name))
    assert found == [f"vllm/{LAYER} is gone"]


def test_a_wheel_is_read_without_unpacking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file missing from it: exit 1 and its name."""
    path = tmp_path / "vllm-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in {clause.file for clause in CONTRACT} - {LAYER}:
            wheel.write(PACKAGE / file, f"vllm/{file}")
    with zipfile.ZipFile(path) as wheel:
        assert differences(from_wheel(wheel)) == [f"vllm/{LAYER} is gone"]
    assert main([str(path)]) == 1
    assert f"vllm/{LAYER} is gone" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2


def test_another_version_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model's class is asked for, which vLLM does first."""
    require_supported()
    monkeypatch.setattr(vllm, "__version__", "9.9.0")
    with pytest.raises(UnsupportedSettings, match=r"vLLM 9.9.0: tested with 0.32.x; nothing"):
        _ = models.CompactMixtralForCausalLM


def test_names_that_are_no_architecture_are_unknown() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="CompactLlamaForCausalLM"):
        _ = models.CompactLlamaForCausalLM
