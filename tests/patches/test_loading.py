"""What a model holds after loading, stage by stage, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.checkpoint.header import read_header
from moe_serve.files import read_json
from tests.patches.test_oracle import servable
from tests.support.loading import load
from tests.support.twins import make_twins, random_table

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OTHERS = {
    # vLLM's Qwen3 builds all of it on every stage, its output being the embedding.
    "qwen3_moe": ([EMBEDDING, NORM], [EMBEDDING, NORM]),
    "deepseek_v3": ([EMBEDDING], [HEAD, NORM]),
}


@pytest.fixture(scope="module", params=sorted(OTHERS))
def compact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, in one of them more blocks than experts; DeepSeek's first has no experts.

    The output is tied to the embedding, which vLLM's DeepSeek knows nothing of.
    """
    root = tmp_path_factory.mktemp("loading")
    source = servable(
        root / "source", str(request.param), num_hidden_layers=4, tie_word_embeddings=True
    )
    kinds = {1: "mixed", 2: "blocks", 3: "dropped"}
    tables = {
        layer: random_table(layer, kind, experts=8, width=96, top_k=2, group_size=2)
        for layer, kind in kinds.items()
    }
    assert tables[2]["blocks"] > 8
    make_twins(source, root / "compact", root / "twin", tables)
    return root / "compact"


def experts(compact: Path) -> list[int]:
    """Bytes of each layer's."""
    entries = read_header(compact / "model.safetensors")
    return [
        sum(e.size for e in entries if ".experts." in e.name and f"layers.{layer}." in e.name)
        for layer in range(4)
    ]


def test_each_stage_holds_its_own_layers_and_is_filled(compact: Path) -> None:
    """The loader finds nothing missing on either, and asks for nothing of the other's."""
    first, last = load(compact, stages=2)
    bytes_of = experts(compact)
    assert [first.expert_bytes, last.expert_bytes] == [sum(bytes_of[:2]), sum(bytes_of[2:])]
    assert (first.others, last.others) == OTHERS[read_json(compact / "config.json")["model_type"]]


def test_weights_read_anew_in_place_are_the_same(compact: Path) -> None:
    """VLLM asks no loader for it, and its models know as many experts as the config has.

    By the config's count the other blocks would be left out without a word.
    """
    (whole,) = load(compact)
    assert whole.same_anew
    assert whole.expert_bytes == sum(experts(compact))
