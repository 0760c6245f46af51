"""What must not be served is refused, with what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engine import ask
from tests.support.models import make_model
from tests.support.twins import make_twins, random_table

PROMPT = [[1, 2, 3]]


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound compact checkpoint."""
    root = tmp_path_factory.mktemp("refusals")
    source = make_model(root / "source", "qwen3_moe")
    tables = {i: random_table(i, "blocks", experts=8, width=64, top_k=2) for i in (0, 1)}
    make_twins(source, root / "compact", root / "tied", tables)
    return root / "compact"


def damaged(compact: Path, name: str) -> Path:
    """A copy to damage."""
    target = compact.with_name(name)
    shutil.copytree(compact, target)
    return target


def test_damaged_checkpoints_are_refused_by_name(compact: Path) -> None:
    """A damaged table, a missing, doubled or truncated tensor: each is named."""
    table = damaged(compact, "table")
    config = json.loads((table / "config.json").read_text())
    config["compact_experts"]["layers"]["1"]["experts"][3] = [99]
    (table / "config.json").write_text(json.dumps(config))

    missing = damaged(compact, "missing")
    weights = load_file(missing / "model.safetensors")
    gone = "model.layers.0.mlp.experts.2.up_proj.weight"
    del weights[gone]
    save_file(weights, missing / "model.safetensors")

    doubled = damaged(compact, "doubled")
    again = "model.layers.1.mlp.experts.0.down_proj.weight"
    save_file({again: weights[again]}, doubled / "model-extra.safetensors")

    truncated = damaged(compact, "truncated")
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate((truncated / "model.safetensors").stat().st_size - 1000)

    norm = damaged(compact, "norm")
    weights = load_file(norm / "model.safetensors")
    del weights["model.layers.0.input_layernorm.weight"]
    save_file(weights, norm / "model.safetensors")

    answers = ask([table, missing, doubled, truncated, norm, compact], PROMPT)
    expected = (
        ("layer 1", "expert 3 lists block 99"),
        ("layer 0", f"{gone} is missing"),
        ("model-extra.safetensors", f"{again} is stored twice"),
        ("model.safetensors", "the file has"),
        ("", "input_layernorm"),
    )
    for answer, (where, what) in zip(answers, expected, strict=False):
        assert isinstance(answer, str)
        assert where in answer
        assert what in answer
    assert not isinstance(answers[-1], str), answers[-1]


def test_settings_are_refused_all_at_once(compact: Path) -> None:
    """Two settings that don't go with compact experts are both named in one message."""
    (answer,) = ask([compact], PROMPT, load_format="auto", enable_lora=True)
    assert isinstance(answer, str)
    assert "--load-format auto, it must be moe_serve" in answer
    assert "--enable-lora" in answer


def test_stock_vllm_refuses_by_name(compact: Path) -> None:
    """Without the plugin nobody serves uninitialised experts."""
    (answer,) = ask([compact], PROMPT, load_format="auto", environment={"VLLM_PLUGINS": "none"})
    assert isinstance(answer, str)
    assert "CompactQwen3MoeForCausalLM" in answer
    assert "not supported" in answer


def test_hashes_are_checked_on_request(compact: Path) -> None:
    """A changed byte is found when asked for."""
    import hashlib

    hashed = damaged(compact, "hashed")
    files = {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in hashed.iterdir()
        if f.name != "moe_serve.json"
    }
    files["tokenizer.json"] = "0" * 64
    (hashed / "moe_serve.json").write_text(json.dumps({"files": files}))
    extra = {"verify_hashes": True}
    (answer,) = ask([hashed], PROMPT, model_loader_extra_config=extra)
    assert isinstance(answer, str)
    assert "tokenizer.json differs from its SHA-256" in answer
