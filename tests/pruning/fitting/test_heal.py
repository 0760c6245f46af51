"""Healing: it helps on tokens it never saw, and changes only what it may."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fixtures import CALIBRATION, HELDOUT, MODEL
from moe_serve.calibration.states import States
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.evaluation.comparison import compare
from moe_serve.evaluation.divergence import divergence
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.fitting import application
from moe_serve.pruning.fitting.application import Application
from moe_serve.pruning.fitting.goals import StreamGoal
from moe_serve.pruning.fitting.heal import heal
from moe_serve.pruning.fitting.walk import FittedLayer
from moe_serve.pruning.plan import Heal, Plan, Refit
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.pruning.fitting.test_refit import problem
from tests.support.models import make_model, write_texts

LENGTH = 128


def healed(root: Path, name: str, **selection: object) -> Path:
    """Half of the trained fixture by neurons; made once."""
    output = root / name
    if output.exists():
        return output
    wanted = Selection(keep=0.5, method="block-obs", **selection)  # type: ignore[arg-type]
    prune(
        PruneRequest(
            model=MODEL,
            output=output,
            texts=TextOptions(paths=(CALIBRATION,), tokens=512, length=LENGTH),
            selection=wanted,
            statistics=root / "statistics",
        ),
        Silent(),
    )
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where outputs and shared statistics lie."""
    return tmp_path_factory.mktemp("heal")


def test_held_out_error_and_divergence_fall(root: Path) -> None:
    """On the tokens that stop it and on other documents; `verify` knows what may differ."""
    plain, trained = healed(root, "plain"), healed(root, "trained", heal=True, heal_rounds=1)
    record = json.loads((trained / "moe_serve.json").read_text())["refit"]
    for layer in record.values():
        errors = layer["heal"]["held_out_errors"]
        assert min(errors) < errors[0]
    unseen = TextOptions(paths=(HELDOUT,), tokens=512, length=LENGTH)
    before, after = (
        compare(MODEL, made, unseen, torch.device("cpu"), 4096, Silent()).mean.kl_nats
        for made in (plain, trained)
    )
    assert after < 0.87 * before
    assert verify(trained, MODEL, Silent()).problems == []


def test_a_hasty_run_trains_on_the_texts_alone(root: Path) -> None:
    """No drafts, and nearer to the original all the same on documents it never saw."""
    plain, hasty = healed(root, "plain"), healed(root, "hasty", heal=True, heal_rounds=0)
    assert Plan.load(hasty / "plan.json").heal == Heal(rounds=0)
    unseen = TextOptions(paths=(HELDOUT,), tokens=512, length=LENGTH)
    before, after = (
        compare(MODEL, made, unseen, torch.device("cpu"), 4096, Silent()).mean.kl_nats
        for made in (plain, hasty)
    )
    assert after < before


def test_the_last_layer_s_error_is_the_model_s_divergence(root: Path, tmp_path: Path) -> None:
    """In nats, on the sequences held out; no closed form leads back to least squares after it.

    The record is from before rounding to BF16, and has each sequence's last token too.
    """
    layers = json.loads((root / "trained" / "moe_serve.json").read_text())["refit"]
    *others, last = (layers[str(index)] for index in range(4))
    assert all("ridge" in layer for layer in others)
    assert "ridge" not in last
    original, trained = open_checkpoint(MODEL), open_checkpoint(root / "trained")
    texts = TextOptions(paths=(CALIBRATION,), tokens=512, length=LENGTH)
    corpus = load_corpus(original, texts)
    assert corpus is not None
    held_T, offsets = corpus.sequences.held_out(Refit().holdout), corpus.sequences.offsets
    held = corpus.sequences.subset([n for n, start in enumerate(offsets) if held_T[start]])
    found = divergence(original, trained, held, tmp_path, torch.device("cpu"), 4096, Silent())
    mean = float(np.mean([values[:, 0].mean() for values in found]))
    assert min(last["heal"]["held_out_errors"]) == pytest.approx(mean, rel=0.1)


def beside_experts(original: Path, made: Path) -> set[str]:
    """Tensors outside the routed experts that differ."""
    before, after = open_checkpoint(original), open_checkpoint(made)
    routed = tuple(map(before.family.expert_prefix, before.expert_bytes()))
    others = (name for name in before.tensors if not name.startswith(routed))
    return {name for name in others if before.read_bytes(name) != after.read_bytes(name)}


def test_where_experts_only_got_smaller_nothing_else_changes(root: Path) -> None:
    """Attention, norms, embeddings, and the router: byte for byte."""
    assert beside_experts(MODEL, root / "trained") == set()


def test_router_rows_change_where_experts_are_gone(tmp_path: Path) -> None:
    """In every layer that gained, and nothing else does."""
    model, texts = make_model(tmp_path / "m", "qwen3_moe"), write_texts(tmp_path / "t.jsonl")
    request = PruneRequest(
        model=model,
        output=tmp_path / "out",
        texts=TextOptions(paths=(texts,), tokens=1000, length=LENGTH),
        selection=Selection(keep=0.5, method="drop-reap", refit=True, heal=True, heal_rounds=1),
    )
    prune(request, Silent())
    record = json.loads((tmp_path / "out/moe_serve.json").read_text())["refit"]
    errors = {int(layer): done["heal"]["held_out_errors"] for layer, done in record.items()}
    gained = [layer for layer, values in errors.items() if min(values) < values[0]]
    assert gained
    family = open_checkpoint(model).family
    assert beside_experts(model, tmp_path / "out") == {family.gate_name(n) for n in gained}


def test_rows_that_led_astray_go_back(tmp_path: Path) -> None:
    """Steps so large that the first epoch loses: from the start again, the router as it was."""
    mixture, z, _, tokens = problem(tmp_path)
    torch.manual_seed(1)
    target, inputs = States(tmp_path / "t", z.shape[1]), States(tmp_path / "z", z.shape[1])
    target.write(0, mixture(z))
    units = tuple(
        dataclasses.replace(u, down_DF=u.down_DF + 0.1 * torch.randn_like(u.down_DF))
        for u in mixture.units
    )
    start = dataclasses.replace(mixture, units=units)
    rows_ND, goal = mixture.router.weight_ND, StreamGoal(target=target)
    moved = {}
    for rate, reroutes in ((0.006, True), (0.006, False), (3.0, True)):
        by = Heal(rate=rate, epochs=3, batch=64)
        found = heal(start, inputs, goal, tokens, by, reroutes=reroutes)
        moved[rate, reroutes] = not torch.equal(found.mixture.router.weight_ND, rows_ND)
        assert (found.errors[1] > found.errors[0]) is (rate > 1.0)
    assert moved == {(0.006, True): True, (0.006, False): False, (3.0, True): False}


def test_a_killed_run_goes_on_to_the_same_bytes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its second layer, when the drafts are known only as hidden states."""
    finish, left = application._finish, [2]

    def dying(app: Application, index: int, layer: FittedLayer | None) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        finish(app, index, layer)

    with monkeypatch.context() as patch:
        patch.setattr(application, "_finish", dying)
        with pytest.raises(KeyboardInterrupt):
            healed(root, "again", heal=True, heal_rounds=1)
    again = healed(root, "again", heal=True, heal_rounds=1)
    for file in sorted((root / "trained").glob("*.safetensors")):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_families_with_shared_experts(family: str, tmp_path: Path) -> None:
    """Of the last layer the closed form, shared experts in it, has to be nearer on held-out tokens.

    Its record says which it was; either way what is written is what was fitted.
    """
    model, texts = make_model(tmp_path / "m", family), write_texts(tmp_path / "t.jsonl")
    request = PruneRequest(
        model=model,
        output=tmp_path / "out",
        texts=TextOptions(paths=(texts,), tokens=1000, length=LENGTH),
        selection=Selection(keep=0.5, method="block-obs", heal=True),
    )
    prune(request, Silent())
    record = json.loads((tmp_path / "out/moe_serve.json").read_text())["refit"]
    for layer in record.values():
        assert layer["error_after"] < layer["error_before"]
    original, made = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    last = max(record, key=int)
    shared = original.family.shared_names(int(last))
    assert shared is not None
    changed = made.read_bytes(shared.down) != original.read_bytes(shared.down)
    assert changed == ("ridge" in record[last])
    assert verify(tmp_path / "out", model, Silent()).problems == []


def test_what_it_needs_is_said_at_once() -> None:
    """Before any work: no texts, no healing."""
    selection = Selection(keep=0.5, method="block-magnitude", heal=True)
    with pytest.raises(UsageError, match="healing needs calibration texts, there are none"):
        selection.resolve(open_checkpoint(MODEL), texts=False)
