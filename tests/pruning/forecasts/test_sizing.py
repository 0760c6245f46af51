"""From a GPU's memory to a share of expert bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import PlanError, UsageError
from moe_serve.families.kv import kv_bytes_per_token
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.forecasts.gpus import gpu_memory, wanted_memory
from moe_serve.pruning.forecasts.sizing import USABLE, keep_for_memory, parse_size
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
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
    """Mixtral-8x7B: 32 layers, 8 heads of 128. DeepSeek-V3: 61 layers of 512 + 64.

    DeepSeek-V3.2's indexer adds a key of 128: 61 · (512 + 64 + 128) · 2 = 85,888 bytes.
    """
    mixtral = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
    }
    assert kv_bytes_per_token(mixtral) == 131_072
    latent = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_bytes_per_token(latent) == 70_272
    assert kv_bytes_per_token(latent | {"index_head_dim": 128}) == 85_888


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


def test_gpus_are_known_by_name() -> None:
    """With or without the maker's name; what is unknown or comes in several sizes lists what is."""
    assert gpu_memory("rtx4090") == gpu_memory("NVIDIA GeForce RTX 4090") == 24_564 * 2**20
    with pytest.raises(UsageError, match=r"no GPU 'Voodoo 2'.*RTX 4090.*H200"):
        gpu_memory("Voodoo 2")
    with pytest.raises(UsageError, match="several sizes; give one of A100 40GB, A100 80GB;"):
        gpu_memory("A100")
    with pytest.raises(UsageError, match="one of the two"):
        wanted_memory("24GB", "L4")
    assert wanted_memory("24GB", None) == 24 * 10**9
    assert wanted_memory(None, None) is None


def test_two_gpus_share_what_can_be_split(tmp_path: Path) -> None:
    """Each holds half of the matrices and of the heads, and all vectors and routers.

    Four heads of 16 over two layers cache 2·2·4·16·2 = 512 bytes a token, half on each GPU; one
    head less than GPUs is on each.
    """
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    sizes = {name: e.size for name, e in checkpoint.tensors.items()}
    vectors = sum(size for name, size in sizes.items() if "norm" in name or "gate.weight" in name)
    experts = sum(checkpoint.expert_bytes().values())
    fixed = sum(sizes.values()) - experts
    # The model's one head of keys and values is on both.
    cache = 100 * kv_bytes_per_token(checkpoint.config)
    each = (fixed - vectors + experts / 2) / 2 + vectors + cache
    keep = keep_for_memory(checkpoint, int(each / USABLE) + 1, 100, 2)
    assert keep == pytest.approx(0.5, abs=1e-4)
    four = checkpoint.config | {"num_key_value_heads": 4, "head_dim": 16}
    assert kv_bytes_per_token(four) == 512
    assert kv_bytes_per_token(four, 2) == 256
    assert kv_bytes_per_token(four, 8) == 128
    with pytest.raises(UsageError, match="gpu-count"):
        keep_for_memory(checkpoint, 10**9, 100, 0)


def test_too_little_memory_says_how_much_is_needed(tmp_path: Path) -> None:
    """What can't be pruned, and the cache, have to fit."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    with pytest.raises(PlanError, match="give more than"):
        keep_for_memory(checkpoint, 100_000, 10)
