"""What goes over beside the experts: files, config values, tensors of any sharding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError, IncompleteCheckpoint
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import change_config, change_weights, make_model
from tests.support.references import our_logits, reference_logits

CARRIED = {
    "generation_config.json": '{"temperature": 0.6, "eos_token_id": [0, 7]}\n',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "added_tokens.json": "{}",
    "tokenizer.model": "a vocabulary",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2",
    "LICENSE": "terms",
}
LEFT = {
    "modeling_custom.py": "raise SystemExit",
    "pytorch_model.bin": "pickled",
    "consolidated.00.pth": "pickled",
    "pytorch_model.bin.index.json": "{}",
    "model-00001-of-00009.safetensors.index.json": "{}",
    ".gitattributes": "",
}


def halved(model: Path, output: Path, form: str = "compact") -> Path:
    """Half of every expert, from the weights alone."""
    request = PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(paths=()),
        selection=Selection(keep=0.5, uniform=True),
        form=form,
    )
    prune(request, Silent())
    return output


def split(model: Path, shards: int) -> Path:
    """The same model in several files with an index, tensors dealt out in turn."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    place = {name: files[number % shards] for number, name in enumerate(sorted(weights))}
    for file in files:
        part = {name: weights[name] for name, at in place.items() if at == file}
        save_file(part, model / file, metadata={"format": "pt"})
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with everything beside its weights."""
    path = make_model(tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16)
    for name, text in (CARRIED | LEFT).items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("form", ["compact", "tied", "native"])
def test_files_beside_the_weights(form: str, model: Path, tmp_path: Path) -> None:
    """Tokenizer, template, generation settings and licence byte for byte; no script, no pickle."""
    out = halved(model, tmp_path / "out", form)
    for name in (*CARRIED, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not [name for name in LEFT if (out / name).exists()]


def test_config_values_go_over(model: Path, tmp_path: Path) -> None:
    """All but what pruning changes; scripts are left behind, and so is what names them."""
    extra: dict[str, Any] = {
        "auto_map": {"AutoConfig": "configuration_custom.Config"},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "some_future_setting": [1, {"a": 2}],
    }
    change_config(model, **extra)
    before = json.loads((model / "config.json").read_text())
    compact = json.loads((halved(model, tmp_path / "c") / "config.json").read_text())
    assert compact.pop("architectures") == ["CompactQwen3MoeForCausalLM"]
    assert set(compact.pop("compact_experts")) == {"version", "layers"}
    assert before.pop("auto_map") == extra["auto_map"]
    names = before.pop("architectures")
    assert compact == before
    native = json.loads((halved(model, tmp_path / "n", "native") / "config.json").read_text())
    changed = {k for k in before.keys() | native.keys() if before.get(k) != native.get(k)}
    assert changed == {"moe_intermediate_size", "architectures"}
    assert native["architectures"] == names
    assert native["moe_intermediate_size"] == before["moe_intermediate_size"] // 2


def test_shards_make_no_difference(model: Path, tmp_path: Path) -> None:
    """Three files with an index give the tensors that one file gives, under a true index."""
    single = halved(model, tmp_path / "single")
    shutil.copytree(model, tmp_path / "s")
    sharded = halved(split(tmp_path / "s", 3), tmp_path / "sharded")
    one, three = open_checkpoint(single), open_checkpoint(sharded)
    assert one.tensors.keys() == three.tensors.keys()
    for name in one.tensors:
        assert one.read_bytes(name) == three.read_bytes(name)
    assert not list(sharded.glob("model-*-of-00003*"))
    export(sharded, tmp_path / "tied", "tied", Silent())
    card = (tmp_path / "tied/README.md").read_text()
    assert "(format `tied`)" in card
    assert "README.md" in Manifest.load(tmp_path / "tied").files
    ids = torch.arange(1, 30)[None]
    torch.testing.assert_close(
        our_logits(sharded, ids), reference_logits(tmp_path / "tied", ids, {}), rtol=1e-5, atol=1e-4
    )


def test_a_half_downloaded_shard_is_named(model: Path) -> None:
    """Cut short, not there yet, or still under its download's name."""
    split(model, 3)
    file = model / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(IncompleteCheckpoint, match=rf"{file.name}.*fetch this file again"):
        open_checkpoint(model)
    file.rename(file.with_suffix(".safetensors.incomplete"))
    with pytest.raises(IncompleteCheckpoint, match=file.name):
        open_checkpoint(model)


def test_output_tied_to_the_embedding(tmp_path: Path) -> None:
    """Without a matrix of its own, and with a copy: the same logits, and as many tensors."""
    path = make_model(tmp_path / "m", "qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    ids = torch.arange(1, 30)[None]
    explicit = tmp_path / "explicit"
    shutil.copytree(path, explicit)

    def repeat(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(explicit, repeat)
    for source in (path, explicit):
        expected = reference_logits(source, ids, {})
        torch.testing.assert_close(our_logits(source, ids), expected, rtol=1e-5, atol=1e-4)
        out = halved(source, tmp_path / f"{source.name}-out")
        names = open_checkpoint(source).tensors.keys(), open_checkpoint(out).tensors.keys()
        assert [("lm_head.weight" in n) for n in names] in ([True, True], [False, False])
        assert open_checkpoint(out).config["tie_word_embeddings"] is True


def test_an_output_matrix_that_contradicts_the_tie_is_refused(tmp_path: Path) -> None:
    """Some software would take the embedding, some the matrix."""
    path = make_model(tmp_path / "m", "qwen3_moe")
    change_config(path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*lm_head\.weight.*differs"):
        our_logits(path, torch.arange(1, 9)[None])


def test_a_missing_output_matrix_is_named(tmp_path: Path) -> None:
    """Not tied, and not there."""
    path = make_model(tmp_path / "m", "qwen3_moe")
    change_weights(path, lambda weights: weights.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"no lm_head\.weight"):
        our_logits(path, torch.arange(1, 9)[None])
