"""Blocks cut over two processes, and layers dealt to two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_serve.checkpoint.header import read_header
from moe_serve.families import rotates_slices
from moe_serve.files import read_json
from tests.patches.test_oracle import BOUND, apart, off, prompts, servable
from tests.support.engine import ask
from tests.support.models import make_model
from tests.support.references import reference_logprobs
from tests.support.twins import make_twins, random_table

RANKS = {
    # The function that counts bytes goes to the ranks, which are ours.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def test_two_ranks_hold_half_of_each_block(tmp_path: Path) -> None:
    """Tensor parallelism of 2, experts of none to two blocks of 64 neurons, one dropped.

    Each rank keeps 32 neurons of every block, the log-probabilities are the twin's.
    """
    source = make_model(
        tmp_path / "source", "qwen3_moe", experts=5, width=128, num_key_value_heads=2
    )
    lists = [[0, 1], [], None, [2], [3, 1]]
    table = {layer: {"width": 64, "blocks": 4, "experts": lists} for layer in (0, 1)}
    dropped = make_twins(source, tmp_path / "compact", tmp_path / "tied", table)
    entries = read_header(tmp_path / "compact" / "model.safetensors")
    stored = sum(entry.size for entry in entries if ".experts." in entry.name)
    (answer,) = ask(
        [tmp_path / "compact"],
        prompts(),
        tensor_parallel_size=2,
        environment=RANKS,
    )
    assert off(answer, reference_logprobs(tmp_path / "tied", prompts(), dropped)) <= 2 * BOUND
    assert not isinstance(answer, str)
    assert answer.rank_bytes == [stored // 2] * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_two_stages_hold_half_of_the_layers(family: str, tmp_path: Path) -> None:
    """Pipeline parallelism of 2 over four layers, experts as in all kinds of tables.

    Qwen's output is tied to the embedding, which both stages then need; DeepSeek has shared experts
    and latent attention. The log-probabilities are those of one stage and the twin's, and each
    stage holds the experts of its own layers only. vLLM's stages are traced on a CPU.
    """
    sizes = {"num_hidden_layers": 4, "tie_word_embeddings": family == "qwen3_moe"}
    source = servable(tmp_path / "source", family, **sizes)
    traced: dict[str, Any] = {"mode": 2, "backend": "eager"}
    if rotates_slices(read_json(source / "config.json")):
        traced["custom_ops"] = ["all", "-rotary_embedding"]
    tables = {
        layer: random_table(layer, kind, experts=8, width=96, top_k=2, group_size=2)
        for layer, kind in ((1, "mixed"), (2, "blocks"), (3, "dropped"))
    }
    dropped = make_twins(source, tmp_path / "compact", tmp_path / "twin", tables)
    entries = read_header(tmp_path / "compact" / "model.safetensors")
    stored = [
        sum(e.size for e in entries if ".experts." in e.name and f"layers.{layer}." in e.name)
        for layer in range(4)
    ]
    (one,) = ask([tmp_path / "compact"], prompts())
    (two,) = ask(
        [tmp_path / "compact"],
        prompts(),
        pipeline_parallel_size=2,
        enforce_eager=False,
        compilation_config=traced,
        environment=RANKS,
    )
    reference = reference_logprobs(tmp_path / "twin", prompts(), dropped)
    assert off(two, reference) <= 2 * BOUND
    assert not isinstance(one, str), one
    assert not isinstance(two, str), two
    assert apart(one, two) <= BOUND
    assert two.rank_bytes == [sum(stored[:2]), sum(stored[2:])]
