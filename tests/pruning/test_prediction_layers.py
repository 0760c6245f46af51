"""Layers for multi-token prediction draft for the original: they go with any change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.evaluation.inspection import inspect
from moe_serve.families.kv import kv_bytes_per_token
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.forecasts.sizing import USABLE, keep_for_memory
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import change_config, change_weights, make_model
from tests.support.references import our_logits, reference_logits

KEYS = {
    "deepseek_v3": "num_nextn_predict_layers",
    "glm4_moe": "num_nextn_predict_layers",
    "glm4_moe_lite": "num_nextn_predict_layers",
    "minimax_m2": "num_mtp_modules",
    "hy_v3": "num_nextn_predict_layers",
}
LAYER = 3


def with_prediction_layer(path: Path, family: str) -> Path:
    """A fourth layer as DeepSeek-V3 and GLM-4.5 publish it: a whole mixture and its own parts."""
    make_model(path, family, num_hidden_layers=LAYER)

    def grow(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if n.startswith(f"model.layers.{LAYER - 1}.")]:
            copy = name.replace(f"layers.{LAYER - 1}.", f"layers.{LAYER}.")
            weights[copy] = weights[name].clone()
        own = f"model.layers.{LAYER}."
        weights[f"{own}eh_proj.weight"] = torch.ones(64, 128)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            weights[f"{own}{norm}.weight"] = torch.ones(64)
        weights[f"{own}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"{own}shared_head.head.weight"] = weights["lm_head.weight"].clone()

    change_weights(path, grow)
    change_config(path, **{KEYS[family]: 1})
    return path


def counted(path: Path) -> int:
    """Such layers by the config."""
    checkpoint = open_checkpoint(path)
    return int(checkpoint.config[checkpoint.family.extra_layers_key or ""])


@pytest.fixture(params=KEYS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with such a layer."""
    return with_prediction_layer(tmp_path / "m", request.param)


def pruned(model: Path, output: Path, keep: float, form: str = "compact") -> Manifest:
    """From the weights alone."""
    request = PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(paths=()),
        selection=Selection(keep=keep, uniform=True),
        form=form,
    )
    return prune(request, Silent()).manifest


def test_they_stay_where_nothing_changes(model: Path, tmp_path: Path) -> None:
    """Keep = 1: every tensor and the config's count."""
    manifest = pruned(model, tmp_path / "out", 1.0)
    same = open_checkpoint(tmp_path / "out")
    assert same.tensors.keys() == open_checkpoint(model).tensors.keys()
    assert counted(tmp_path / "out") == 1
    assert manifest.prediction_layers is not None
    assert manifest.prediction_layers.kept
    assert "Left out" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("form", ["compact", "tied", "native"])
def test_they_go_with_any_change(form: str, model: Path, tmp_path: Path) -> None:
    """No tensor of theirs stays, the config counts none, and manifest, card and inspect say so."""
    before = inspect(model)
    assert before["prediction_layers"]["layers"] == [LAYER]
    assert before["bytes"]["prediction_layers"] == before["prediction_layers"]["bytes"] > 0
    out = tmp_path / "out"
    made = pruned(model, out, 0.5, form).prediction_layers
    assert made is not None
    assert (made.layers, made.kept) == ((LAYER,), False)
    assert made.bytes == before["prediction_layers"]["bytes"]
    checkpoint = open_checkpoint(out)
    assert not [name for name in checkpoint.tensors if f"layers.{LAYER}." in name]
    assert counted(out) == 0
    assert "Layers 3 (" in (out / "README.md").read_text()
    assert inspect(out)["prediction_layers"] == {"layers": [], "bytes": 0, "left_out": [LAYER]}
    if form == "compact":
        served = open_checkpoint(model).family.served
        assert ("plugin" in inspect(out)["served_by"]) is served
        assert ("moe-serve export" in (out / "README.md").read_text()) is not served
        assert verify(out, model, Silent()).problems == []
    else:
        ids = torch.arange(1, 20)[None]
        torch.testing.assert_close(
            our_logits(out, ids), reference_logits(out, ids, {}), rtol=1e-5, atol=1e-4
        )


def test_the_memory_asked_for_counts_them_only_where_they_stay(tmp_path: Path) -> None:
    """All fits: keep everything. Only they are too much: next to nothing else goes."""
    path = with_prediction_layer(tmp_path / "m", "deepseek_v3")
    checkpoint = open_checkpoint(path)
    cache = 100 * kv_bytes_per_token(checkpoint.config)
    whole = sum(entry.size for entry in checkpoint.tensors.values()) + cache
    extra = sum(checkpoint.prediction_layers().values())
    experts = sum(checkpoint.expert_bytes().values())
    assert keep_for_memory(checkpoint, int(whole / USABLE) + 2, 100) == 1.0
    assert keep_for_memory(checkpoint, int((whole - 1000) / USABLE), 100) == 0.999
    half = keep_for_memory(checkpoint, int((whole - extra - experts / 2) / USABLE), 100)
    assert half == pytest.approx(0.5, abs=1e-3)


def test_a_config_that_names_none_is_refused(model: Path) -> None:
    """The files hold a layer that the config does not count."""
    key = str(open_checkpoint(model).family.extra_layers_key)
    change_config(model, **{key: 0})
    with pytest.raises(CheckpointError, match=rf"layers\.3\..*beyond the 3.*{key}"):
        open_checkpoint(model)


def test_a_count_without_files_is_no_defect(tmp_path: Path) -> None:
    """Checkpoints saved by transformers keep the count and lose the layers."""
    path = make_model(tmp_path / "m", "deepseek_v3", num_nextn_predict_layers=1)
    assert json.loads((path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert open_checkpoint(path).prediction_layers() == {}
    assert pruned(path, tmp_path / "out", 0.5).prediction_layers is None
    assert open_checkpoint(tmp_path / "out").config["num_nextn_predict_layers"] == 0


def test_a_block_with_a_name_of_its_own_goes_too(tmp_path: Path) -> None:
    """ERNIE's is no numbered layer; it is told of as the layer after the last."""
    path = make_model(tmp_path / "m", "ernie4_5_moe")
    change_weights(
        path, lambda w: w.update({"model.mtp_linear_proj.0.weight": torch.ones(64, 128)})
    )
    change_config(path, num_nextn_predict_layers=1)
    assert pruned(path, tmp_path / "same", 1.0).prediction_layers is not None
    assert open_checkpoint(tmp_path / "same").has("model.mtp_linear_proj.0.weight")
    made = pruned(path, tmp_path / "out", 0.5).prediction_layers
    assert made is not None
    assert (made.layers, made.kept, made.bytes) == ((LAYER,), False, 64 * 128 * 4)
    after = open_checkpoint(tmp_path / "out")
    assert not [name for name in after.tensors if "mtp" in name]
    assert after.config["num_nextn_predict_layers"] == 0
