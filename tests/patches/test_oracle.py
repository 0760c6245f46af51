"""Compact in vLLM equals its full-size twin, in stock transformers and in stock vLLM."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from moe_serve.checkpoint.header import read_header
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.engine import Reply, ask
from tests.support.models import SERVABLE, VOCABULARY, make_model
from tests.support.references import reference_logprobs
from tests.support.twins import Table, make_twins, random_table

BOUND = 2e-5
KINDS = ("whole", "blocks", "merged", "empty", "dropped", "mixed")
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"),
    *("deepseek_v2", "deepseek_v3"),
)
"""Those left out have the code of one of these; ``benchmarks/serving/oracle.py`` has them all."""
EXPERTS, TOP_K, WIDTH = 8, 2, 96


def prompts() -> list[list[int]]:
    """Three prompts of different length, more than 64 tokens in all."""
    rng = random.Random(1)
    return [[rng.randrange(1, VOCABULARY) for _ in range(n)] for n in (60, 17, 3)]


def apart(a: Reply, b: Reply) -> float:
    """Largest difference of log-probabilities over prompt and generated tokens."""
    pairs = [
        (x, y)
        for left, right in zip(a.answers, b.answers, strict=True)
        for x, y in zip(
            [*left.prompt[1:], *left.generated], [*right.prompt[1:], *right.generated], strict=True
        )
    ]
    return max(abs(float(x or 0) - float(y or 0)) for x, y in pairs)


def tables_of(source: Path, kind: str, number: int) -> dict[int, Table]:
    """A random table for each layer with experts; one is left out in two kinds.

    Where the router ranks groups, whole groups are dropped, in one kind all but one of a group.
    """
    opened = open_checkpoint(source)
    groups = opened.family.routing_of(opened.config).groups
    whole_groups = groups > 1 and kind != "dropped"
    layers = opened.family.moe_layers(opened.config)
    return {
        layer: random_table(
            number + layer,
            kind,
            experts=EXPERTS,
            width=WIDTH,
            top_k=TOP_K,
            group_size=EXPERTS // groups if whole_groups else 1,
        )
        for layer in (layers[1:] if kind in ("merged", "mixed") else layers)
    }


def servable(path: Path, family: str, **changes: Any) -> Path:
    """A random model of three layers with sizes that vLLM takes on a CPU."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, **SERVABLE.get(family, {}), **changes}
    return make_model(path, family, experts=EXPERTS, top_k=TOP_K, width=WIDTH, **sizes)


def off(ours: Reply | str, reference: list[list[float]]) -> float:
    """Largest difference of prompt log-probabilities from transformers'."""
    assert not isinstance(ours, str), ours
    return max(
        abs(float(a or 0) - b)
        for answer, row in zip(ours.answers, reference, strict=True)
        for a, b in zip(answer.prompt[1:], row, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_its_twin(family: str, tmp_path: Path) -> None:
    """Same log-probabilities to 2e-5 and the same tokens, for every kind of table.

    Against transformers the engine's own distance from it, on the unpruned model, is added: it is
    up to 2e-5 on these models with their large random weights.

    The engine holds as many expert bytes as the file, no more.

    Stock vLLM can't mask an expert, so kinds with dropped experts are held against transformers
    with the mask added, all others against both.
    """
    source = servable(tmp_path / "source", family)
    folders, references, with_twin = [source], {}, []
    references["source"] = reference_logprobs(source, prompts(), {})
    for number, kind in enumerate(KINDS):
        tables = tables_of(source, kind, number)
        compact, tied = tmp_path / f"{kind}-compact", tmp_path / f"{kind}-tied"
        dropped = make_twins(source, compact, tied, tables, seed=number)
        folders.append(compact)
        references[kind] = reference_logprobs(tied, prompts(), dropped)
        if not any(dropped.values()):
            with_twin.append(kind)
            folders.append(tied)
    assert {"blocks", "merged", "empty"} <= set(with_twin)
    answers = dict(zip((f.name for f in folders), ask(folders, prompts()), strict=True))
    own = off(answers["source"], references["source"])
    assert own <= BOUND
    for kind in KINDS:
        compact_answer = answers[f"{kind}-compact"]
        assert not isinstance(compact_answer, str), compact_answer
        # From the header: our reader refuses a table that strands an expert of a ranked group.
        entries = read_header(tmp_path / f"{kind}-compact" / "model.safetensors")
        stored = sum(entry.size for entry in entries if ".experts." in entry.name)
        assert compact_answer.expert_bytes == stored, kind
        assert off(compact_answer, references[kind]) <= BOUND + own, kind
        if kind in with_twin:
            tied_answer = answers[f"{kind}-tied"]
            assert not isinstance(tied_answer, str), tied_answer
            assert apart(compact_answer, tied_answer) <= BOUND, kind
            assert [a.tokens for a in compact_answer.answers] == [
                a.tokens for a in tied_answer.answers
            ], kind


def test_a_wrong_block_would_show(tmp_path: Path) -> None:
    """The oracle can fail: another choice of neurons is far outside the bound."""
    source = make_model(tmp_path / "source", "qwen3_moe", experts=EXPERTS, width=WIDTH)
    table = {0: random_table(0, "blocks", experts=EXPERTS, width=WIDTH, top_k=TOP_K)}
    make_twins(source, tmp_path / "a-compact", tmp_path / "a-tied", table, seed=1)
    make_twins(source, tmp_path / "b-compact", tmp_path / "b-tied", table, seed=2)
    a, b = (reference_logprobs(tmp_path / f"{n}-tied", prompts(), {}) for n in "ab")
    far = max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert far > 1000 * BOUND


def test_a_tied_output_is_the_embedding(tmp_path: Path) -> None:
    """OLMoE in vLLM has an output of its own whatever the config says; we fill it.

    Stock vLLM is given the pruner's own tied form, which holds the output.
    """
    source = make_model(tmp_path / "source", "olmoe", width=WIDTH, tie_word_embeddings=True)
    table = {0: random_table(0, "blocks", experts=EXPERTS, width=WIDTH, top_k=TOP_K)}
    make_twins(source, tmp_path / "compact", tmp_path / "twin", table)
    request = PruneRequest(
        model=source,
        output=tmp_path / "stock",
        texts=TextOptions(paths=()),
        selection=Selection(keep=0.5),
        form="tied",
    )
    prune(request, Silent())
    compact, stock = ask([tmp_path / "compact", tmp_path / "stock"], prompts())
    assert off(compact, reference_logprobs(tmp_path / "twin", prompts(), {})) <= 2 * BOUND
    assert off(stock, reference_logprobs(tmp_path / "stock", prompts(), {})) <= 2 * BOUND
