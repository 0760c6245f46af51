"""One count and one width: which sizes are possible, what they cost, which one is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.mixture import Router
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import PlanError
from moe_serve.evaluation.divergence import divergence
from moe_serve.families import Shape
from moe_serve.families.routing import Routing
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.ground import Measured
from moe_serve.pruning.methods.neurons import Ladder
from moe_serve.pruning.methods.obs import RemovalPath
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.native import Narrowed, Size, Weighed, _Search, choose, feasible
from moe_serve.pruning.plan import LayerPlan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.trial import Trial, trial_share
from tests.support.calibrated import calibrated
from tests.support.models import make_model
from tests.support.references import our_logits, reference_logits

DEAD = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose expert 5 puts out nothing, calibrated."""
    root = tmp_path_factory.mktemp("native")
    model = make_model(root / "m", "qwen3_moe", width=96, seed=3)
    weights = load_file(model / "model.safetensors")
    for layer in (0, 1):
        weights[f"model.layers.{layer}.mlp.experts.{DEAD}.down_proj.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    calibrated(model, root)
    return root


def shape(experts: int, width: int, top_k: int) -> Shape:
    """Sizes."""
    return Shape(layers=2, hidden=64, experts=experts, top_k=top_k, width=width, vocabulary=9)


def test_feasible_sizes_fill_the_budget() -> None:
    """Half of 16 · 192 = 3072 neurons is 1536 = 16 · 96 = 12 · 128; 9 · 160 and 8 · 192 fit too."""
    found = feasible(shape(16, 192, 4), Routing(top_k=4), 0.5)
    assert found == [Size(8, 192), Size(9, 160), Size(12, 128), Size(16, 96)]


def test_wide_experts_keep_multiples_of_32() -> None:
    """A quarter less of 8 · 512 is 3072: 7 · 416 = 2912 fits, 7 · 448 = 3136 does not."""
    found = feasible(shape(8, 512, 2), Routing(top_k=2), 0.75)
    assert found == [Size(6, 512), Size(7, 416), Size(8, 384)]


def test_groups_lose_the_same_number() -> None:
    """Of 4 groups of 4, ranked by their best two, 2 · 4 or 3 · 4 experts can stay, never 4."""
    rule = Routing(top_k=3, groups=4, groups_selected=2, group_score="best-two")
    assert {size.experts for size in feasible(shape(16, 192, 3), rule, 0.75)} == {12, 16}
    assert {size.experts for size in feasible(shape(16, 192, 3), rule, 0.5)} == {8, 12, 16}
    # 0.26 · 16 · 192 = 798 would hold 4 whole ones: two groups of one each, for three selected.
    assert {size.experts for size in feasible(shape(16, 192, 3), rule, 0.26)} == {8, 12, 16}


def test_too_small_a_budget_is_refused() -> None:
    """4 experts of 32 neurons are 128; 3 % of 16 · 192 are 92."""
    with pytest.raises(PlanError, match="too few for 4 experts of 32 neurons"):
        feasible(shape(16, 192, 4), Routing(top_k=4), 0.03)


def test_drop_errors_are_those_of_the_layer_run_again(root: Path) -> None:
    """The dead expert goes first, free where nobody is displaced by it; the rest is brute force."""
    checkpoint = open_checkpoint(root / "m")
    view = LayerView.of(checkpoint, None, 1)
    mixture = view.mixture()
    z_SD = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    root_DD = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    search = _Search.of(mixture, z_SD, root_DD)
    found = search.keep(5, torch.zeros(8, dtype=torch.float64))
    dropped = [e for e in range(8) if e not in found.kept]
    changed = search._without(dropped)
    weights_SN = changed(z_SD)
    outputs_NSD = torch.stack([mixture.hidden(u, z_SD) @ u.down_DF.T for u in mixture.units])
    change_SD = torch.einsum("sn,nsd->sd", weights_SN - mixture.router(z_SD), outputs_NSD)
    expected = float((change_SD @ root_DD).square().sum(dim=1).mean())
    assert found.dropped_error == pytest.approx(expected, rel=1e-4)
    assert len(found.kept) == 5


def test_an_expert_whose_narrowing_costs_much_goes_instead() -> None:
    """Dropping frees its narrowing error: with 10^9 on expert 2 it is the one that goes."""
    router = Router(weight_ND=torch.eye(4), rule=Routing(top_k=2))
    search = _Search(
        router=router,
        z_SD=torch.randn(20, 4, generator=torch.Generator().manual_seed(0)),
        weights_SN=router(torch.randn(20, 4, generator=torch.Generator().manual_seed(0))),
        gram_SNN=torch.eye(4).expand(20, 4, 4),
    )
    narrowed = torch.tensor([0.0, 0.0, 1e9, 0.0], dtype=torch.float64)
    assert search.keep(3, narrowed).kept == (0, 1, 3)


def weighed() -> Weighed:
    """Two experts of two neurons: both narrow, or one whole, which is estimated to be better."""
    path = RemovalPath(
        order_NI=torch.tensor([[0, 1], [1, 0]]),
        error_NI=torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64),
    )
    options = {Size(2, 1): Narrowed((0, 1), 0.0, 2.0), Size(1, 2): Narrowed((1,), 0.5, 0.0)}
    return Weighed(ladders={0: Ladder(path=path)}, options={0: options})


def test_measurement_overrules_the_estimate() -> None:
    """Estimated 2.0 against 0.5, measured 0.1 against 0.3: the first is taken, both are told."""

    def measure(_name: str, layers: dict[int, object]) -> Measured:
        narrow = len(layers[0].blocks) == 2  # type: ignore[attr-defined]
        return Measured(0.1, 0.2, {"a": 0.1}) if narrow else Measured(0.3, 0.4, {})

    layers, why = choose(weighed(), measure)  # type: ignore[arg-type]
    assert [block.parts[0].neurons for block in layers[0].blocks] == [(1,), (0,)]
    assert why["size"] == {"experts": 2, "width": 1, "top_k": None}
    assert [row["estimated_error"] for row in why["weighed"]] == [0.5, 2.0]
    assert why["weighed"][1]["measured_kl"] == {
        "mean": 0.1,
        "worst": 0.2,
        "domains": {"a": 0.1},
    }


@pytest.mark.parametrize(("one_whole", "experts"), [(0.109, 1), (0.111, 2)])
def test_fewer_experts_may_cost_a_tenth(one_whole: float, experts: int) -> None:
    """Two narrow ones measure 0.1: one whole expert at 0.109 is taken, at 0.111 not."""

    def measure(_name: str, layers: dict[int, LayerPlan]) -> Measured:
        mean = 0.1 if len(layers[0].blocks) == 2 else one_whole
        return Measured(mean, mean, {"a": mean})

    assert choose(weighed(), measure)[1]["size"]["experts"] == experts


def test_without_texts_the_estimate_decides() -> None:
    """One whole expert; the other is never selected."""
    layers, why = choose(weighed(), None)
    assert layers[0].experts == (None, (0,))
    assert why["weighed"][0]["measured_kl"] is None


def test_native_loads_in_stock_transformers(root: Path, tmp_path: Path) -> None:
    """The same logits there as in our forward; every size is in the plan's settings."""
    texts = TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128)
    request = PruneRequest(
        model=root / "m",
        output=tmp_path / "out",
        texts=texts,
        selection=Selection(keep=0.7, uniform=True),
        form="native",
        statistics=root / "statistics",
        batch_tokens=512,
    )
    result = prune(request, Silent())
    # 0.7 · 8 · 96 = 537 = 5 · 96 + 57 = 8 · 64 + 25, or 16 blocks of 32.
    rows = result.manifest.settings["weighed"]
    sizes = {(row["experts"], row["width"], row["top_k"]) for row in rows}
    assert sizes == {(5, 96, None), (8, 64, None), (16, 32, 6)}
    best = min(
        (row for row in rows if row["measured_kl"]), key=lambda row: row["measured_kl"]["mean"]
    )
    made = open_checkpoint(tmp_path / "out").shape
    assert (made.experts, made.width) == (best["experts"], best["width"])
    assert made.top_k == (best["top_k"] or 2)
    assert verify(tmp_path / "out", None, Silent()).problems == []
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    stock = reference_logits(tmp_path / "out", ids, {})
    torch.testing.assert_close(our_logits(tmp_path / "out", ids), stock, rtol=1e-4, atol=1e-4)


def test_a_trial_says_what_a_comparison_of_the_files_says(root: Path, tmp_path: Path) -> None:
    """Without a re-fit nothing depends on the tokens that fit: the same KL on the same tokens."""
    checkpoint = open_checkpoint(root / "m")
    texts = TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128)
    corpus = load_corpus(checkpoint, texts)
    assert corpus is not None
    selection = Selection(keep=0.5, method="drop-random", refit=False)
    plan = make_plan(checkpoint, None, selection, Silent())
    device = torch.device("cpu")
    trial = Trial(
        checkpoint=checkpoint,
        sequences=corpus.sequences,
        folder=tmp_path,
        device=device,
        batch_tokens=512,
    )
    assert trial.measure("nothing", {}, None).worst == pytest.approx(0.0, abs=1e-6)
    found = trial.measure("plan", plan.layers, None)
    request = PruneRequest(
        model=root / "m", output=tmp_path / "out", texts=TextOptions(paths=()), selection=selection
    )
    prune(request, Silent())
    sequences = trial_share(corpus.sequences)
    measured_T = sequences.held_out(0.25)
    chosen = [
        number
        for number, start in enumerate(sequences.offsets)
        if bool(measured_T[start]) and len(sequences.tokens[number]) > 1
    ]
    part = sequences.subset(chosen)
    pruned = open_checkpoint(tmp_path / "out")
    values = divergence(checkpoint, pruned, part, tmp_path, device, 512, Silent())
    # A comparison leaves out each sequence's last token, which predicts nothing: 1 in 128.
    kl = float(np.concatenate(values)[:, 0].mean())
    assert found.mean == pytest.approx(kl, rel=0.1)


def test_a_method_without_a_loss_metric_narrows_every_expert_alike(
    root: Path, tmp_path: Path
) -> None:
    """Weights alone say nothing of what a drop costs: all 8 stay, with 64 of their 96 neurons."""
    request = PruneRequest(
        model=root / "m",
        output=tmp_path / "out",
        texts=TextOptions(paths=()),
        selection=Selection(keep=0.7, method="block-magnitude", uniform=True),
        form="native",
    )
    prune(request, Silent())
    made = open_checkpoint(tmp_path / "out").shape
    assert (made.experts, made.width) == (8, 64)
