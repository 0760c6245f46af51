"""Our layer-by-layer forward against transformers': as published, and pruned by any table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.calibration.mixture import Mixture, Router, make_units
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.families import Routing
from moe_serve.pruning.corpus import TextOptions, load_corpus
from tests.support.models import FAMILIES, change_weights, make_model, write_texts
from tests.support.references import our_logits, reference_logits
from tests.support.twins import make_twins, random_table

_KINDS = (("whole", "blocks", "merged"), ("empty", "dropped", "mixed"))


def tokens(rows: int, length: int) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(1, 250, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """Layer by layer gives the whole model's logits, from config and weights as published."""
    path = make_model(tmp_path / "m", family)
    ids = tokens(3, 60)
    torch.testing.assert_close(
        our_logits(path, ids), reference_logits(path, ids, {}), rtol=1e-5, atol=2e-5
    )


def test_texts_are_cut_to_what_attention_sees_whole(tmp_path: Path) -> None:
    """The indexer chooses 64 tokens: sequences of 128 become ones of 64."""
    path = make_model(tmp_path / "m", "deepseek_v32")
    options = TextOptions(paths=(write_texts(tmp_path / "t.jsonl"),), tokens=1024, length=128)
    corpus = load_corpus(open_checkpoint(path), options)
    assert corpus is not None
    assert {len(tokens) for tokens in corpus.sequences.tokens} == {64}


def test_stored_frequencies_are_not_needed(tmp_path: Path) -> None:
    """Old checkpoints hold a buffer that follows from the config."""
    path = make_model(tmp_path / "m", "deepseek")
    ids = tokens(1, 20)
    expected = our_logits(path, ids)
    change_weights(
        path, lambda w: w.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    )
    assert torch.equal(our_logits(path, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", _KINDS, ids="-".join)
def test_compact_equals_its_full_size_twin(
    family: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """A table of another kind in each layer; the twin is made by plain loops, not by our writer.

    A model's logits reach 7, so 1e-5 of that is asked for.
    """
    count = 3 if family in ("mixtral", "qwen3_moe", "olmoe", "minimax_m2", "solar_open") else 4
    more: dict[str, Any] = {"num_hidden_layers": count}
    if family in ("glm4_moe_lite", "hy_v3"):
        more["mlp_layer_types"] = ["dense"] + ["sparse"] * 3
    if family == "glm_moe_dsa":
        more["indexer_types"] = ["full", "shared"] * 2
    source = make_model(tmp_path / "m", family, **more)
    opened = open_checkpoint(source)
    sparse = opened.family.moe_layers(opened.config)
    groups = opened.family.routing_of(opened.config).groups
    tables = {
        layer: random_table(
            layer, kind, experts=8, width=64, top_k=2, group_size=8 // groups if groups > 1 else 1
        )
        for layer, kind in zip(sparse, kinds, strict=True)
    }
    dropped = make_twins(source, tmp_path / "compact", tmp_path / "tied", tables)
    ids = tokens(2, 30)
    ours = our_logits(tmp_path / "compact", ids)
    torch.testing.assert_close(
        ours, reference_logits(tmp_path / "tied", ids, dropped), rtol=1e-5, atol=1e-5 * 7
    )
    assert float((ours - reference_logits(source, ids, {})).abs().max()) > 0.01


@st.composite
def tables(draw: st.DrawFn) -> tuple[LayerTable, int]:
    """Any sound table of 2 to 7 experts and its I: shared, empty and dropped ones included."""
    experts = draw(st.integers(2, 7))
    most = draw(st.integers(1, 4))
    width = draw(st.integers(1, 5))
    lists: list[tuple[int, ...] | None] = []
    pool = list(range(draw(st.integers(1, experts * most))))
    for _ in range(experts):
        chosen = st.lists(st.sampled_from(pool), max_size=most, unique=True).map(tuple)
        lists.append(draw(st.none() | chosen))
    if not any(lists):
        lists[0] = (0,)
    used = sorted({block for blocks in lists for block in blocks or ()})
    number = {block: place for place, block in enumerate(used)}
    renamed = tuple(None if b is None else tuple(number[x] for x in b) for b in lists)
    return LayerTable(width=width, blocks=len(used), experts=renamed), width * most


@settings(max_examples=400, deadline=None)
@given(drawn=tables(), seed=st.integers(0, 2**31), data=st.data())
def test_any_table_means_the_original_with_other_experts(
    drawn: tuple[LayerTable, int], seed: int, data: st.DataObject
) -> None:
    """An expert is its blocks side by side, zeros up to I, whoever shares them.

    Plain loops over tokens and the full-size experts give the same output to 1e-5; in FP64, as the
    terms of a sum may cancel.
    """
    table, full = drawn
    experts, hidden = len(table.experts), 6
    generator = torch.Generator().manual_seed(seed)
    left = experts - len(table.dropped)
    rule = Routing(
        top_k=data.draw(st.integers(1, left), "top_k"),
        score=data.draw(st.sampled_from(["softmax", "sigmoid"]), "score"),
        renormalise=data.draw(st.booleans(), "renormalise"),
        scale=data.draw(st.sampled_from([1.0, 2.5]), "scale"),
    )
    router = Router(
        weight_ND=torch.randn(experts, hidden, generator=generator, dtype=torch.float64),
        rule=rule,
        bias_N=torch.randn(experts, generator=generator, dtype=torch.float64)
        if rule.score == "sigmoid"
        else None,
        dropped=table.dropped,
    )
    gate, up = (
        list(
            torch.randn(table.blocks, table.width, hidden, generator=generator, dtype=torch.float64)
        )
        for _ in "ab"
    )
    down = list(
        torch.randn(table.blocks, hidden, table.width, generator=generator, dtype=torch.float64)
    )
    mixture = Mixture(
        router=router,
        units=make_units(table, gate, up, down),
        activation=torch.nn.functional.silu,
    )
    z_TD = torch.randn(5, hidden, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(z_TD)
    for expert, blocks in enumerate(table.experts):
        wide, tall = z_TD.new_zeros(2, full, hidden), z_TD.new_zeros(hidden, full)
        for place, block in enumerate(blocks or ()):
            span = slice(place * table.width, (place + 1) * table.width)
            wide[0, span], wide[1, span], tall[:, span] = gate[block], up[block], down[block]
        for row, z in enumerate(z_TD):
            weight = router(z_TD)[row, expert]
            assert blocks is not None or weight == 0
            h = torch.nn.functional.silu(wide[0] @ z) * (wide[1] @ z)
            expected[row] += weight * (tall @ h)
    torch.testing.assert_close(mixture(z_TD), expected, rtol=1e-5, atol=1e-5)
