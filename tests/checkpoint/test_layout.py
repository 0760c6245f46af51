"""Which tensors an output holds beside its experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("family", "form", "own"),
    [
        ("olmoe", "tied", True),
        ("olmoe", "native", True),
        ("olmoe", "compact", False),  # the plugin's loader takes the embedding
        ("qwen3_moe", "tied", False),  # vLLM's class ties
    ],
)
def test_an_output_is_written_where_vllm_does_not_tie(
    family: str, form: str, own: bool, tmp_path: Path
) -> None:
    """The embedding's bytes a second time, and a config that says so."""
    request = PruneRequest(
        model=make_model(tmp_path / "m", family, tie_word_embeddings=True),
        output=tmp_path / "out",
        texts=TextOptions(paths=(write_texts(tmp_path / "t.jsonl"),), tokens=512, length=128),
        selection=Selection(keep=0.5, uniform=form == "native"),
        form=form,
        batch_tokens=512,
    )
    assert HEAD not in load_file(tmp_path / "m" / "model.safetensors")
    prune(request, Silent())
    weights = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not own
    assert (HEAD in weights) is own
    if own:
        assert torch.equal(weights[HEAD], weights[EMBEDDING])
