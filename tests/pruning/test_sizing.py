"""From a GPU's memory to a share of expert bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import PlanError, UsageError
from moe_serve.families.kv import kv_bytes_per_token
from moe_serve.progress import Silent
from moe_serve.pruning.request import Selection, TextOptions
from moe_serve.pruning.run import PruneRequest, prune
from moe_serve.pruning.sizing import USABLE, keep_for_memory, parse_size
from tests.support.models import make_model


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * 2**30), ("24 GB", 24 * 10**9), ("1.5g", 1_500_000_000), ("512MiB", 2**29)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Binary and decimal units, with or without the B."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0GiB", "12 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """With an example of what is one."""
    with pytest.raises(UsageError, match="20GiB"):
        parse_size(text)


def test_cache_of_published_models() -> None:
    """Mixtral-8x7B: 32 layers, 8 heads of 128. DeepSeek-V3: 61 layers of 512 + 64."""
    mixtral = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
    }
    assert kv_bytes_per_token(mixtral) == 131_072
    latent = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_bytes_per_token(latent) == 70_272


def test_the_result_fits(tmp_path: Path) -> None:
    """Weights and cache of the pruned model stay within the memory asked for."""
    model = make_model(tmp_path / "m", "mixtral")
    checkpoint = open_checkpoint(model)
    whole = sum(e.size for e in checkpoint.tensors.values())
    cache = 100 * kv_bytes_per_token(checkpoint.config)
    memory = int((0.7 * whole + cache) / USABLE)
    texts = TextOptions(paths=())
    selection = Selection(memory=memory, kv_tokens=100)
    prune(
        PruneRequest(model=model, output=tmp_path / "o", texts=texts, selection=selection), Silent()
    )
    after = sum(e.size for e in open_checkpoint(tmp_path / "o").tensors.values())
    assert 0.6 * whole < after <= memory * USABLE - cache
    assert keep_for_memory(checkpoint, 100 * whole, 10) == 1.0


def test_too_little_memory_says_how_much_is_needed(tmp_path: Path) -> None:
    """What can't be pruned, and the cache, have to fit."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    with pytest.raises(PlanError, match="give more than"):
        keep_for_memory(checkpoint, 100_000, 10)
