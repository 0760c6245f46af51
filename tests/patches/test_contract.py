"""What the plugin relies on in vLLM, and what happens when it is not there."""

from __future__ import annotations

import ast
import shutil
import zipfile
from pathlib import Path

import pytest
import vllm

import moe_serve_vllm
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
CONFIG = "model_executor/layers/fused_moe/config.py"
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


def test_every_name_imported_from_vllm_is_listed() -> None:
    """A new import without a clause would go unnoticed when another version lacks it.

    ``vllm.config`` and ``vllm`` pass on names of the modules that define them.
    """
    listed = {clause.name.partition(".")[0] for clause in CONTRACT}
    listed |= {member for clause in CONTRACT for member in getattr(clause, "members", ())}
    imported: set[str] = set()
    for file in Path(moe_serve_vllm.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {alias.name for alias in node.names}
    assert {"RoutedExperts", "GateLinear", "VllmConfig"} <= imported
    assert imported - listed == set()


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
        for file in {"_version.py", *(clause.file for clause in CONTRACT)} - {LAYER}:
            wheel.write(PACKAGE / file, f"vllm/{file}")
    with zipfile.ZipFile(path) as wheel:
        assert differences(from_wheel(wheel)) == [f"vllm/{LAYER} is gone"]
    assert main([str(path)]) == 1
    assert f"vllm/{LAYER} is gone" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2


def vllm_of(version: str, folder: Path, more: str = "") -> Path:
    """The listed files of the installed vLLM as another version; ``more`` in the layer's config."""
    for file in {clause.file for clause in CONTRACT}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, folder / file)
    (folder / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    field = "    num_local_experts: int\n"
    config = (folder / CONFIG).read_text()
    assert field in config
    (folder / CONFIG).write_text(config.replace(field, field + more))
    return folder


def test_an_unknown_version_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model's class is asked for, which vLLM does first."""
    assert not require_supported().asks_for_modular
    monkeypatch.setattr(vllm, "__version__", "9.9.0")
    with pytest.raises(UnsupportedSettings, match=r"vLLM 9.9.0: made for 0.32.x, 0.33.x; nothing"):
        _ = models.CompactMixtralForCausalLM


def test_a_version_known_by_its_source_is_compared_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.33 is taken where the field that only it has is there, and refused where it is not."""
    sound = vllm_of("0.33.0", tmp_path / "a", "    require_decomposed_backend: bool = False\n")
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.setattr(vllm, "__path__", [str(sound)])
    assert require_supported().asks_for_modular
    monkeypatch.setattr(vllm, "__path__", [str(vllm_of("0.33.1", tmp_path / "b"))])
    with pytest.raises(UnsupportedSettings, match="FusedMoEConfig has no require_decomposed_back"):
        require_supported()


def test_what_was_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The version, and whether the tests run with it."""
    assert main([str(vllm_of("0.32.7", tmp_path / "a"))]) == 0
    assert "vLLM 0.32.7: 0 differences" in (told := capsys.readouterr().out)
    assert "the tests run with it" in told
    assert main([str(vllm_of("0.99.0", tmp_path / "b"))]) == 1
    assert "unknown to the plugin, refused" in capsys.readouterr().out


def test_names_that_are_no_architecture_are_unknown() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="CompactLlamaForCausalLM"):
        _ = models.CompactLlamaForCausalLM
