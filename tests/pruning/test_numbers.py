"""Pruning quantised models: what is kept byte for byte, what is rounded again, and that it says so.

Experts of 128 neurons in tiles of 32: four tiles each.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.mixture import read_mixture
from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError, UsageError
from moe_serve.evaluation.inspection import inspect
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.numbers import removal_unit
from moe_serve.pruning.plan import LayerPlan, Plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection, block_width
from tests.support.models import make_model, write_texts
from tests.support.quantised import LAYOUTS, TILE, quantise_model

WIDTH, EXPERTS = 4 * TILE, 8
CPU = torch.device("cpu")
GATE = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
UP = "model.layers.{}.mlp.experts.{}.up_proj.weight"
DOWN = "model.layers.{}.mlp.experts.{}.down_proj.weight"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration texts."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module", params=LAYOUTS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """Layout, quantised model, and what its matrices stand for."""
    folder = tmp_path_factory.mktemp("model")
    source = make_model(folder / "m", "qwen3_moe", width=WIDTH, dtype=torch.bfloat16)
    return request.param, folder / "q", quantise_model(source, folder / "q", request.param)


def run(model: Path, output: Path, texts: Path | None, **selection: object) -> Plan:
    """Prune to half unless told otherwise; the output must verify against the original."""
    wanted = {"keep": 0.5, "method": "block-obs" if texts else "block-magnitude"}
    form = str(selection.pop("form", "compact"))
    prune(
        PruneRequest(
            model=model,
            output=output,
            texts=TextOptions(paths=(texts,) if texts else (), tokens=1024, length=128),
            selection=Selection(**(wanted | selection)),  # type: ignore[arg-type]
            form=form,
            batch_tokens=512,
        ),
        Silent(),
    )
    against = model if form == "compact" else None
    assert verify(output, against, Silent()).problems == []
    return Plan.load(output / "plan.json")


def tile_of(neurons: tuple[int, ...]) -> int:
    """The one whole tile these neurons are."""
    assert neurons == tuple(range(neurons[0], neurons[0] + TILE))
    assert neurons[0] % TILE == 0
    return neurons[0] // TILE


def test_keeping_everything_is_identity(
    model: tuple[str, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Keep = 1: every tensor byte for byte, whatever the format."""
    _, source, _ = model
    run(source, tmp_path / "out", None, keep=1.0)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before.read_bytes(n) == after.read_bytes(n) for n in before.tensors)


def test_kept_tiles_stand_for_what_they_did(
    model: tuple[str, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Without a re-fit every block is whole tiles, and no value has changed."""
    _, source, values = model
    plan = run(source, tmp_path / "out", None, block_width=TILE)
    assert plan.numbers is not None
    assert plan.numbers.requantised == {"gate": 0, "up": 0, "down": 0}
    out = open_checkpoint(tmp_path / "out")
    for layer, planned in plan.layers.items():
        for number, block in enumerate(planned.blocks):
            (part,) = block.parts
            picked = torch.tensor(part.neurons)
            for name, axis in ((GATE, 0), (UP, 0), (DOWN, 1)):
                expected = values[name.format(layer, part.expert)].index_select(axis, picked)
                assert torch.equal(out.weight(name.format(layer, number)), expected)


def test_kept_tiles_keep_their_bytes(tmp_path: Path) -> None:
    """FP8 codes and scales, cut by hand: rows of gate, columns of down."""
    source = make_model(tmp_path / "m", "qwen3_moe", width=WIDTH, dtype=torch.bfloat16)
    quantise_model(source, tmp_path / "q", "fp8-tiles")
    plan = run(tmp_path / "q", tmp_path / "out", None)
    assert "quantised" in inspect(tmp_path / "out")["served_by"]
    before = load_file(tmp_path / "q" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for layer, planned in plan.layers.items():
        for number, block in enumerate(planned.blocks):
            (part,) = block.parts
            t = tile_of(part.neurons)
            rows = slice(t * TILE, (t + 1) * TILE)
            old = GATE.format(layer, part.expert)
            new = GATE.format(layer, number)
            assert torch.equal(before[old].view(torch.uint8)[rows], after[new].view(torch.uint8))
            assert torch.equal(before[old + "_scale_inv"][t : t + 1], after[new + "_scale_inv"])
            old, new = DOWN.format(layer, part.expert), DOWN.format(layer, number)
            assert torch.equal(before[old].view(torch.uint8)[:, rows], after[new].view(torch.uint8))
            assert torch.equal(before[old + "_scale_inv"][:, t : t + 1], after[new + "_scale_inv"])


def test_refit_rounds_only_down(
    model: tuple[str, Path, dict[str, torch.Tensor]], texts: Path, tmp_path: Path
) -> None:
    """Gate and up are kept, down is rounded again; plan, manifest and card say so."""
    layout, source, values = model
    plan = run(source, tmp_path / "out", texts, refit=True)
    blocks = sum(len(layer.blocks) for layer in plan.layers.values())
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.numbers is not None
    assert manifest.numbers["tile"] == (1 if layout in ("fp8-rows", "fp8-whole") else TILE)
    assert manifest.numbers["kept"] == {"gate": blocks, "up": blocks, "down": 0}
    assert manifest.numbers["requantised"] == {"gate": 0, "up": 0, "down": blocks}
    assert "rounded again" in (tmp_path / "out" / "README.md").read_text()
    out = open_checkpoint(tmp_path / "out")
    down_changed = 0
    for layer, planned in plan.layers.items():
        for number, block in enumerate(planned.blocks):
            (part,) = block.parts
            picked = torch.tensor(part.neurons)
            kept = values[GATE.format(layer, part.expert)].index_select(0, picked)
            assert torch.equal(out.weight(GATE.format(layer, number)), kept)
            was = values[DOWN.format(layer, part.expert)].index_select(1, picked)
            down_changed += not torch.equal(out.weight(DOWN.format(layer, number)), was)
    assert down_changed > blocks // 2


def test_requantise_chooses_freely(
    model: tuple[str, Path, dict[str, torch.Tensor]], texts: Path, tmp_path: Path
) -> None:
    """Neurons of any tile share a block; what is stored is within a rounding of the original's."""
    layout, source, values = model
    plan = run(source, tmp_path / "out", texts, refit=False, requantise=True)
    parts = [b.parts[0] for layer in plan.layers.values() for b in layer.blocks]
    assert any(p.neurons[-1] - p.neurons[0] >= TILE for p in parts)
    out = open_checkpoint(tmp_path / "out")
    bits4 = layout in ("int4", "int4-zeros", "gptq", "gptq-zeros", "gptq-v2", "awq")
    for layer, planned in plan.layers.items():
        for number, block in enumerate(planned.blocks):
            (part,) = block.parts
            for name, axis in ((GATE, 0), (DOWN, 1)):
                was = values[name.format(layer, part.expert)]
                was = was.index_select(axis, torch.tensor(part.neurons))
                off = out.weight(name.format(layer, number)) - was
                assert float(off.norm() / was.norm()) < (0.1 if bits4 else 0.03)


@pytest.mark.parametrize("refit", [False, True])
def test_tied_is_the_same_function(
    model: tuple[str, Path, dict[str, torch.Tensor]], texts: Path, tmp_path: Path, *, refit: bool
) -> None:
    """Compact and tied give the same layer outputs: padding adds nothing, blocks keep scales."""
    _, source, _ = model
    run(source, tmp_path / "out", texts, refit=refit)
    export(tmp_path / "out", tmp_path / "tied", "tied", Silent())
    compact, tied = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "tied")
    assert tied.config.get("quantization_config") == compact.config.get("quantization_config")
    z_TD = torch.randn(64, compact.shape.hidden)
    for layer in (0, 1):
        a, b = (read_mixture(c, layer, CPU)(z_TD) for c in (compact, tied))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe"])
def test_other_families(family: str, texts: Path, tmp_path: Path) -> None:
    """Latent attention, shared experts, correction biases; a cache's scales are just copied."""
    source = make_model(tmp_path / "m", family, width=WIDTH, dtype=torch.bfloat16)
    quantise_model(source, tmp_path / "q", "fp8-tiles")
    file = tmp_path / "q" / "model.safetensors"
    scale = {"model.layers.0.self_attn.attn.k_scale": torch.ones(1)}
    save_file(load_file(file) | scale, file, metadata={"format": "pt"})
    run(tmp_path / "q", tmp_path / "out", texts, refit=True)
    export(tmp_path / "out", tmp_path / "tied", "tied", Silent())
    compact, tied = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "tied")
    assert all(name in tied.tensors for name in scale)
    layer = max(compact.table.layers)
    z_TD = torch.randn(64, compact.shape.hidden)
    a, b = (read_mixture(c, layer, CPU)(z_TD) for c in (compact, tied))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == compact.tensors.keys()
    assert index["metadata"]["total_size"] == sum(e.size for e in compact.tensors.values())


@pytest.mark.parametrize("ending", ["weight_packed", "weight_scale", "weight_shape"])
def test_verify_sees_one_changed_number(ending: str, tmp_path: Path) -> None:
    """A word, a scale or a shape of one block: named, whether or not its hash was renewed."""
    source = make_model(tmp_path / "m", "qwen3_moe", width=WIDTH, dtype=torch.bfloat16)
    quantise_model(source, tmp_path / "q", "int4")
    out = tmp_path / "out"
    run(tmp_path / "q", out, None)
    name = f"model.layers.1.mlp.experts.2.up_proj.{ending}"
    weights = load_file(out / "model.safetensors")
    weights[name].view(-1)[0] += 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    Manifest.load(out).save(out, Silent())
    if ending == "weight_shape":
        with pytest.raises(CheckpointError, match="up_proj"):
            verify(out, tmp_path / "q", Silent())
    else:
        (problem,) = verify(out, tmp_path / "q", Silent()).problems
        assert ending in problem
        assert "experts.2.up_proj" in problem


def test_merged_experts_are_quantised_again(texts: Path, tmp_path: Path) -> None:
    """A merge is rounded, an expert kept alone keeps its bytes."""
    source = make_model(tmp_path / "m", "mixtral", width=64, dtype=torch.bfloat16)
    quantise_model(source, tmp_path / "q", "int4")
    plan = run(tmp_path / "q", tmp_path / "out", texts, method="merge-cka", keep=0.75)

    def merged(layer: LayerPlan) -> int:
        return sum(len(b.parts) > 1 for b in layer.blocks)

    count = sum(map(merged, plan.layers.values()))
    assert count > 0
    assert plan.numbers is not None
    assert plan.numbers.requantised == {"gate": count, "up": count, "down": count}


def test_neurons_that_go_together(model: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """Whole tiles; with a re-fit only what shares an FP8 scale along gate and up's rows."""
    layout, source, _ = model
    free = layout in ("fp8-rows", "fp8-whole")
    checkpoint = open_checkpoint(source)
    assert removal_unit(checkpoint, refit=False) == (1 if free else TILE)
    assert removal_unit(checkpoint, refit=True) == (TILE if layout == "fp8-tiles" else 1)


def test_blocks_narrower_than_a_tile_are_refused(tmp_path: Path) -> None:
    """128 neurons under one scale can't be cut at 64; the default is the tile."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe", width=512))
    assert block_width(checkpoint, None, 1) == 64
    assert block_width(checkpoint, None, 128) == 128
    with pytest.raises(UsageError, match="not a multiple of 128 up to 512, as its number format"):
        block_width(checkpoint, 64, 128)
