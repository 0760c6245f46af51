"""What the formulas say of each step against what a run does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.families import Shape
from moe_serve.progress import Silent
from moe_serve.pruning import gathering, run
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.forecasts.healing import drafts_step, healed_step
from moe_serve.pruning.forecasts.steps import apply_step, calibrate_step, plan_step
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.plan import Heal, Refit
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

SIZES = Sizes(
    shape=Shape(layers=2, hidden=10, experts=4, top_k=2, width=6, vocabulary=100),
    sparse=2,
    total_bytes=8000,
    decoder_bytes=4000,
    expert_bytes=2880,
    embedding_bytes=2000,
    head_bytes=2000,
    layer_bytes=2000,
    layer_weights=1000,
    dense_weights=500,
)
WORK = Work(tokens=100, domains=2, length=50, batch_tokens=64)


def test_arithmetic_of_a_calibration() -> None:
    """Two passes over the decoder, and the products of each part.

    A token: 2·500 + 2 layers · 2·50·10 = 3,000 outside the experts; 2·2 layers·2 experts·180 =
    1,440 in them; normal matrices 2 layers · 2 experts · 2·6² = 288. Back, at most 16,384 tokens:
    3·1,500 + 1·1,500 (the lower of two layers) + 5/3·1,440 = 8,400, the loss 6·100·10, the metric
    2·10²·2 layers. What lies below the lowest mixture is not read again.
    """
    step = calibrate_step(SIZES, WORK)
    assert step.passes == 2
    assert step.flops == pytest.approx(100 * (3000 + 1440 + 288 + 8400 + 6000 + 400))
    assert step.read - SIZES.statistics_bytes(2) == 2 * 4000 + 2000 + 2000
    above = calibrate_step(replace(SIZES, lowest=1, lower_bytes=300), WORK)
    assert step.read - above.read == 300
    assert step.flops - above.flops == pytest.approx(100 * 3 * 1500)
    # One layer's normal matrices: 4 experts of 6² numbers; a layer in FP32 and as stored.
    assert step.memory >= 4 * 36 * 4 + 1000 * 4 + 2000


def test_methods_that_feel_no_loss_spare_the_way_back() -> None:
    """One pass, no output matrix, fewer files."""
    work = Work(tokens=100, domains=2, length=50, batch_tokens=64, reverse=0)
    step = calibrate_step(SIZES, work)
    assert step.passes == 1
    assert step.flops == pytest.approx(100 * (3000 + 1440 + 288))
    assert step.read - SIZES.statistics_bytes(2, gradients=False) == 4000 + 2000
    assert step.disk < calibrate_step(SIZES, WORK).disk


def test_arithmetic_of_inversions() -> None:
    """2·(24·6³ + 2·6²·10) + 2·6·10² = 13,008 for each of 8 experts; nothing for others."""
    assert plan_step(SIZES, WORK).flops == 0
    inverting = Work(tokens=100, domains=2, length=50, batch_tokens=64, inverts=True)
    assert plan_step(SIZES, inverting).flops == pytest.approx(8 * 13008)
    # Of 6 neurons on vectors of 2, by the weights: 8·(5/3·6³ + 6²·2) + 2·6·2² = 3,504.
    wide = replace(SIZES, shape=replace(SIZES.shape, hidden=2))
    assert plan_step(wide, inverting).flops == pytest.approx(8 * 3504)


def test_arithmetic_of_comparisons() -> None:
    """All experts on 1,024 tokens, their Gram matrices, and inner products of aligned neurons.

    An expert on the reservoir 2·1024·180; in FP64 its Gram matrix 4·1024²·10, that with 4 others
    4·1024²·4;
    3 alignments in each of 2 layers, 6·6²·10 each.
    """
    comparing = replace(WORK, compares=1)
    expected = 8 * (2 * 1024 * 180 + 4 * 1024**2 * 14)
    assert plan_step(SIZES, comparing).processor_flops == pytest.approx(expected)
    more = plan_step(SIZES, comparing).memory - plan_step(SIZES, WORK).memory
    assert more == 4 * (1024 * 10 * 4 + 1024**2 * 8)
    aligning = plan_step(SIZES, replace(WORK, alignments=3))
    assert aligning.processor_flops == pytest.approx(2 * 3 * 2160)


def test_a_refit_costs_more_and_stores_as_much() -> None:
    """Half of the experts' bytes go either way: 8000 - 1440."""
    half = Work(tokens=100, domains=2, length=50, batch_tokens=64, keep=0.5)
    fitted = Work(tokens=100, domains=2, length=50, batch_tokens=64, keep=0.5, refit=Refit())
    plain, fit = apply_step(SIZES, half), apply_step(SIZES, fitted)
    assert plain.written == fit.written == 8000 - 1440
    assert plain.flops == 0 < fit.flops
    assert plain.disk == 0
    assert fit.disk == 7 * 100 * 10 * 4


def test_arithmetic_of_healing() -> None:
    """80 of 100 tokens are trained on, and 2 drafts of each with half of their tokens drawn.

    Drafts: two rounds of 80·(3,000 + 1,440), logits of 80 drawn tokens 2·100·10 each. Training:
    240 tokens three times forward through half of the experts, 720 each, and 20 held out twice;
    240 tokens' loss five products with the output matrix, 2·100·10 each, that of 40 two; 24 steps
    of 12 matrices in 2 layers, sides 3 and 10, 5·(4·9·10 + 2·27) each.
    """
    by = Heal(rounds=2, drafts=1, redrawn=0.5, epochs=1, batch=100)
    half = replace(WORK, keep=0.5)
    drafts = drafts_step(SIZES, half, by)
    assert drafts.passes == 2
    assert drafts.flops == pytest.approx(2 * 80 * 4440 + 80 * 2000)
    assert drafts.read == 2 * (4000 + 2000 + 2000)
    plain = apply_step(SIZES, replace(half, tokens=260, refit=Refit(ridges=())))
    trained = healed_step(SIZES, half, by).flops - plain.flops
    products = 240 * 3 * 720 + 40 * 720 + 240 * 5 * 2000 + 40 * 2 * 2000
    assert trained == pytest.approx(products + 24 * 2 * 12 * 5 * 414)


@pytest.mark.parametrize(
    ("family", "heal"), [("qwen3_moe", None), ("deepseek_v3", None), ("qwen3_moe", Heal())]
)
def test_weights_are_read_as_often_as_said(
    family: str, heal: Heal | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes counted by the reader, against the sum over the steps; and the files on disk."""
    model, texts = make_model(tmp_path / "m", family), write_texts(tmp_path / "t.jsonl")
    opened: list[Checkpoint] = []

    def opening(path: Path) -> Checkpoint:
        opened.append(open_checkpoint(path))
        return opened[-1]

    for module in (run, gathering):
        monkeypatch.setattr(module, "open_checkpoint", opening)
    options = TextOptions(paths=(texts,), tokens=1000, length=128)
    request = PruneRequest(
        model=model,
        output=tmp_path / "out",
        texts=options,
        selection=Selection(keep=0.5, method="block-obs", heal=heal is not None),
        statistics=tmp_path / "s",
    )
    prune(request, Silent())
    corpus = load_corpus(opened[0], options)
    assert corpus is not None
    sizes = Sizes.of(opened[0])
    work = Work(
        tokens=corpus.sequences.total,
        domains=2,
        length=128,
        batch_tokens=request.batch_tokens,
        keep=0.5,
        inverts=True,
        refit=Refit(),
        heal=heal,
    )
    calibrated, planned = calibrate_step(sizes, work), plan_step(sizes, work)
    applied = healed_step(sizes, work, heal) if heal else apply_step(sizes, work)
    drafted = drafts_step(sizes, work, heal).read if heal else 0
    statistics = sizes.statistics_bytes(2)
    stored = (tmp_path / "s/statistics.safetensors").stat().st_size
    assert statistics <= stored <= statistics * 1.01 + 20_000
    hashed = 2 * statistics + sizes.total_bytes + applied.written
    said = calibrated.read + planned.read + drafted + applied.read - hashed
    assert sum(checkpoint.bytes_read for checkpoint in opened) == pytest.approx(said, rel=0.02)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written <= applied.written * 1.01 + 20_000
