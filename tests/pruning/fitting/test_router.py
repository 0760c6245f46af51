"""Router rows re-fitted: the derivative, the solution, and when it is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_serve.calibration.mixture import Mixture, read_mixture
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.router import fit_rows, sensitivity, solve_rows
from moe_serve.pruning.plan import Plan, RouterFit
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts
from tests.support.references import our_logits, reference_logits

TOKENS = 600


def mixture_of(path: Path, family: str) -> Mixture:
    """A layer with moderate router weights, so that a small change keeps the selections."""
    checkpoint = open_checkpoint(make_model(path / family, family))
    layer = checkpoint.family.moe_layers(checkpoint.config)[-1]
    return read_mixture(checkpoint, layer, torch.device("cpu"))


def with_rows(mixture: Mixture, rows_ED: torch.Tensor) -> Mixture:
    """The same layer with other router rows."""
    router = dataclasses.replace(mixture.router, weight_ND=rows_ED)
    return dataclasses.replace(mixture, router=router)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_the_derivative_is_that_of_the_layer(family: str, tmp_path: Path) -> None:
    """Normalised softmax, plain softmax, scaled sigmoids: d·A d = Σ ω ‖dy‖², d·b = Σ ω e·dy."""
    mixture = mixture_of(tmp_path, family)
    generator = torch.Generator().manual_seed(1)
    z_TD = torch.randn(TOKENS, 64, generator=generator)
    e_TD = torch.randn(TOKENS, 64, generator=generator)
    omega_T = torch.rand(TOKENS, generator=generator)
    step_ED = 1e-3 * torch.randn(8, 64, generator=generator)
    if family == "olmoe":
        # A plain softmax also feels the logits of experts that are not selected; J leaves them out.
        step_ED = step_ED - step_ED.mean(dim=0)
    changed = with_rows(mixture, mixture.router.weight_ND + step_ED)
    before_TN, after_TN = mixture.router(z_TD), changed.router(z_TD)
    same = torch.nonzero(((before_TN > 0) == (after_TN > 0)).all(dim=1)).squeeze(1)
    assert len(same) > TOKENS * 0.9
    z_TD, e_TD, omega_T = z_TD[same], e_TD[same], omega_T[same]
    dy_TD = changed(z_TD) - mixture(z_TD)
    found = sensitivity(mixture, z_TD, e_TD, omega_T)
    square = float((dy_TD.square().sum(dim=1) * omega_T).sum())
    slope = float(((dy_TD * e_TD).sum(dim=1) * omega_T).sum())
    rel = 0.5 if family == "olmoe" else 0.02
    assert float((step_ED * found.product(step_ED)).sum()) == pytest.approx(square, rel=rel)
    if family != "olmoe":
        assert float((step_ED * found.gradient(8)).sum()) == pytest.approx(slope, rel=0.05)


def test_conjugate_gradients_solve_the_ridge_system(tmp_path: Path) -> None:
    """(A + λI) d = b to 1e-3 of b, with the tokens in two batches."""
    mixture = mixture_of(tmp_path, "qwen3_moe")
    generator = torch.Generator().manual_seed(2)
    z_TD = torch.randn(TOKENS, 64, generator=generator)
    e_TD = torch.randn(TOKENS, 64, generator=generator)
    halves = [
        sensitivity(mixture, z, e, torch.ones(len(z)))
        for z, e in zip(z_TD.split(400), e_TD.split(400), strict=True)
    ]
    d_ED = solve_rows(halves, 8, 5.0, 500)
    b_ED = halves[0].gradient(8) + halves[1].gradient(8)
    a_ED = halves[0].product(d_ED) + halves[1].product(d_ED) + 5.0 * d_ED
    assert float((a_ED - b_ED).norm()) <= 1e-3 * float(b_ED.norm())


def tokens_of(
    inputs: States, residual: States, z_TD: torch.Tensor, e_TD: torch.Tensor
) -> FitTokens:
    """Every fifth token held out."""
    inputs.write(0, z_TD)
    residual.write(0, e_TD)
    batch = Batch(
        sequences=(0,), shape=(1, len(z_TD)), tokens=slice(0, len(z_TD)), device=torch.device("cpu")
    )
    held_T = torch.arange(len(z_TD)) % 5 == 4
    return FitTokens(batches=(batch,), omega_T=torch.ones(len(z_TD)), held_T=held_T)


def test_disturbed_rows_are_set_right(tmp_path: Path) -> None:
    """The target is the layer before its rows were moved: half of the held-out error goes.

    The other half is from tokens whose selection had flipped, which one linear step can't see.

    The residual afterwards is the target minus what the layer with the new rows puts out.
    """
    right = mixture_of(tmp_path, "qwen3_moe")
    generator = torch.Generator().manual_seed(3)
    wrong = with_rows(
        right, right.router.weight_ND + 0.03 * torch.randn(8, 64, generator=generator)
    )
    z_TD = torch.randn(4 * TOKENS, 64, generator=generator)
    inputs, residual = (States(tmp_path / n, 64) for n in ("inputs", "residual"))
    tokens = tokens_of(inputs, residual, z_TD, right(z_TD) - wrong(z_TD))
    found = fit_rows(wrong, inputs, residual, tokens, RouterFit(ridges=(0.001,)), torch.float32)
    assert found.ridge == 0.001
    assert found.error_after < 0.6 * found.error_before
    fitted = dataclasses.replace(wrong, router=found.router)
    left_TD = right(z_TD) - fitted(z_TD)
    torch.testing.assert_close(residual.read(0, len(z_TD)), left_TD, rtol=1e-3, atol=1e-3)
    held_TD = left_TD[4::5]
    assert float(held_TD.square().sum(dim=1).mean()) == pytest.approx(found.error_after, rel=1e-3)


def test_noise_leaves_the_rows(tmp_path: Path) -> None:
    """A residual that no router can follow: held-out tokens say no, and nothing changes."""
    mixture = mixture_of(tmp_path, "qwen3_moe")
    generator = torch.Generator().manual_seed(4)
    z_TD = torch.randn(TOKENS, 64, generator=generator)
    e_TD = torch.randn(TOKENS, 64, generator=generator)
    inputs, residual = (States(tmp_path / n, 64) for n in ("inputs", "residual"))
    tokens = tokens_of(inputs, residual, z_TD, e_TD)
    found = fit_rows(mixture, inputs, residual, tokens, RouterFit(), torch.float32)
    assert found.ridge is None
    assert torch.equal(found.router.weight_ND, mixture.router.weight_ND)
    assert torch.equal(residual.read(0, TOKENS), e_TD)


@pytest.mark.parametrize(("form", "refit"), [("compact", False), ("native", True)])
def test_a_router_is_refitted_in_a_run(form: str, refit: bool, tmp_path: Path) -> None:
    """Files hold the new rows, verify knows of them, stock software agrees where it loads them."""
    model = make_model(tmp_path / "m", "mixtral", dtype=torch.bfloat16)
    texts = TextOptions(paths=(write_texts(tmp_path / "t.jsonl"),), tokens=1024, length=128)
    request = PruneRequest(
        model=model,
        output=tmp_path / "planned",
        texts=texts,
        selection=Selection(keep=0.5, method="drop-reap", router_refit=True, refit=refit),
        form=form,
        batch_tokens=512,
    )
    tried = prune(request, Silent()).manifest.settings["router_refit"]
    # Without a trial the rows are fitted wherever a layer's held-out tokens allow it.
    plan = Plan.load(tmp_path / "planned/plan.json").model_copy(
        update={"router": RouterFit(margin=-1.0)}
    )
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    given = dataclasses.replace(request, output=out, plan=tmp_path / "plan.json")
    record = prune(given, Silent()).manifest.refit
    assert tried["with"]["mean"] > 0
    assert record is not None
    assert all(layer["router"]["ridge"] is not None for layer in record.values())
    name = "model.layers.1.block_sparse_moe.gate.weight"
    rows, before = open_checkpoint(out).read(name), open_checkpoint(model).read(name)
    kept = [e for e, b in enumerate(plan.layers[1].experts) if b is not None]
    assert len(rows) == (8 if form == "compact" else 4)
    fitted = rows[kept] if form == "compact" else rows
    assert not torch.equal(fitted, before[kept])
    assert verify(out, model if form == "compact" else None, Silent()).problems == []
    if form == "native":
        ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
        stock = reference_logits(out, ids, {})
        torch.testing.assert_close(our_logits(out, ids), stock, rtol=1e-3, atol=1e-3)


def test_a_router_refit_needs_texts(tmp_path: Path) -> None:
    """Said before anything is read."""
    model = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    selection = Selection(keep=0.5, method="block-magnitude", router_refit=True)
    with pytest.raises(UsageError, match="router needs calibration texts"):
        selection.resolve(model, texts=False)
