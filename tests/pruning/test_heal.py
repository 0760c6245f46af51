"""Healing: it helps on tokens it never saw, and changes only what it may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.evaluation.comparison import compare
from moe_serve.progress import Silent
from moe_serve.pruning.request import Selection, TextOptions
from moe_serve.pruning.run import PruneRequest, prune
from moe_serve.pruning.verify import verify
from tests.support.models import make_model, write_texts

TEXTS_LENGTH = 64


def healed(root: Path, name: str, **selection: object) -> Path:
    """Half of a tiny model by neurons."""
    output = root / name
    texts = TextOptions(paths=(root / "texts.jsonl",), tokens=2048, length=TEXTS_LENGTH)
    wanted = Selection(keep=0.5, method="block-obs", **selection)  # type: ignore[arg-type]
    prune(
        PruneRequest(
            model=root / "m", output=output, texts=texts, selection=wanted, batch_tokens=512
        ),
        Silent(),
    )
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and texts, a domain of vowels and one of consonants."""
    root = tmp_path_factory.mktemp("heal")
    # Shared expert and correction bias: what training has to leave alone.
    make_model(root / "m", "glm4_moe", width=64, seed=3)
    write_texts(root / "texts.jsonl")
    write_texts(root / "unseen.jsonl", seed=1)
    return root


def test_held_out_error_and_divergence_fall(root: Path) -> None:
    """On the tokens that stopped it and on texts of another seed; `verify` knows what changed."""
    plain, trained = healed(root, "plain"), healed(root, "trained", heal=True)
    record = json.loads((trained / "moe_serve.json").read_text())["refit"]
    for layer in record.values():
        errors = layer["heal"]["held_out_errors"]
        assert min(errors) < errors[0]
    unseen = TextOptions(paths=(root / "unseen.jsonl",), tokens=2048, length=TEXTS_LENGTH)
    before, after = (
        compare(root / "m", made, unseen, torch.device("cpu"), 512, Silent()).mean.kl_nats
        for made in (plain, trained)
    )
    assert after < 0.95 * before
    assert verify(trained, root / "m", Silent()).problems == []


def test_only_routed_experts_and_router_rows_change(root: Path) -> None:
    """Attention, norms, shared experts, biases: byte for byte."""
    original, trained = (open_checkpoint(root / name) for name in ("m", "trained"))
    routed = tuple(map(original.family.expert_prefix, original.expert_bytes()))
    rows = {original.family.gate_name(layer) for layer in original.expert_bytes()}
    for name in original.tensors:
        if not name.startswith(routed) and name not in rows and "shared_experts" not in name:
            assert trained.read_bytes(name) == original.read_bytes(name), name


def test_it_is_repeatable(root: Path) -> None:
    """The same bytes again."""
    again = healed(root, "again", heal=True)
    for file in sorted((root / "trained").glob("*.safetensors")):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_what_it_needs_is_said_at_once(root: Path) -> None:
    """Before any work: no texts, no healing."""
    selection = Selection(keep=0.5, method="block-magnitude", heal=True)
    with pytest.raises(UsageError, match="healing needs calibration texts, there are none"):
        selection.resolve(open_checkpoint(root / "m"), texts=False)
