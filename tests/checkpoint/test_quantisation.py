"""Number formats: what codes mean, what is cut and joined exactly, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_serve.checkpoint.quantisation import COLUMNS, ROWS, InexactJoin, Scheme
from moe_serve.checkpoint.quantisation.carry import Renumbering, renumbered_settings
from moe_serve.checkpoint.quantisation.codes import pack, unpack
from moe_serve.checkpoint.quantisation.fp8 import Fp8
from moe_serve.checkpoint.quantisation.packed import AWQ_ORDER, Packed
from moe_serve.checkpoint.quantisation.plain import Plain
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError, IncompleteCheckpoint
from tests.support.models import make_model
from tests.support.quantised import (
    AWQ_PLACES,
    LAYOUTS,
    TILE,
    e4m3_value,
    quantise_model,
    word_of,
)

TILED = Fp8(
    scale="weight_scale_inv", scale_dtype="F32", scale_dims=2, row_step=TILE, column_step=TILE
)
BY_ROWS = Fp8(scale="weight_scale", scale_dtype="BF16", scale_dims=2, row_step=1, column_step=None)
WHOLE = Fp8(scale="weight_scale", scale_dtype="F32", scale_dims=1, row_step=None, column_step=None)


def packed(layout: str, *, bits: int = 4, symmetric: bool = True, offset: int = 0) -> Packed:
    """A scheme with groups of 32."""
    return Packed(
        layout=layout,  # type: ignore[arg-type]
        bits=bits,
        group=TILE,
        scale_dtype="BF16" if layout == "compressed-tensors" else "F16",
        symmetric=symmetric,
        stored_zero=layout != "compressed-tensors" or not symmetric,
        zero_offset=offset,
        shape_dtype="I64" if layout == "compressed-tensors" else None,
        group_index=layout == "GPTQ",
    )


SCHEMES: dict[str, Scheme] = {
    "plain": Plain(dtype="BF16"),
    "fp8-tiles": TILED,
    "fp8-rows": BY_ROWS,
    "fp8-whole": WHOLE,
    "int4": packed("compressed-tensors"),
    "int4-zeros": packed("compressed-tensors", symmetric=False),
    "int8": packed("compressed-tensors", bits=8),
    "gptq": packed("GPTQ", offset=1),
    "gptq-zeros": packed("GPTQ", symmetric=False, offset=1),
    "awq": packed("AWQ", symmetric=False),
}
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bytes."""
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape
        and torch.equal(
            a[k].contiguous().view(-1).view(torch.uint8),
            b[k].contiguous().view(-1).view(torch.uint8),
        )
        for k in a
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_read_as_the_plain_loops_meant_them(layout: str, tmp_path: Path) -> None:
    """Every quantised matrix, attention and experts, has the values its quantiser says."""
    source = make_model(tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16)
    values = quantise_model(source, tmp_path / "q", layout)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert len(values) == 2 * (4 + 8 * 3)
    for name, expected in values.items():
        torch.testing.assert_close(checkpoint.weight(name), expected, rtol=1e-6, atol=0)
    gate = "model.layers.0.mlp.gate.weight"
    assert checkpoint.scheme(gate) == Plain(dtype="BF16")
    assert torch.equal(checkpoint.weight(gate), open_checkpoint(source).weight(gate))


def test_every_fp8_code() -> None:
    """All 256 bytes mean sign · mantissa · power of two; two of them are NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    found = WHOLE.dequantise({"weight": codes, "weight_scale": torch.tensor([2.0])})
    expected = torch.tensor([2 * e4m3_value(byte) for byte in range(256)]).view(16, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert int(found.isnan().sum()) == 2


@given(st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_one_word_by_hand(codes: list[int]) -> None:
    """Code i at bits 4i; with AWQ's order at the place its interleave says."""
    table = torch.tensor([codes], dtype=torch.int32)
    straight = pack(table, 4, 1, tuple(range(8)))
    assert straight.item() == word_of(codes, 4)
    interleaved = pack(table, 4, 1, AWQ_ORDER)
    assert interleaved.item() == word_of(codes, 4, AWQ_PLACES)
    assert torch.equal(unpack(straight, 4, 1, tuple(range(8))), table)
    assert torch.equal(unpack(interleaved, 4, 1, AWQ_ORDER), table)


@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    dim=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_packing_is_undone(bits: int, rows: int, columns: int, dim: int, seed: int) -> None:
    """Whatever the shape and the packed dimension."""
    generator = torch.Generator().manual_seed(seed)
    shape = [rows, columns]
    shape[dim] *= 32 // bits
    codes = torch.randint(1 << bits, shape, generator=generator, dtype=torch.int32)
    order = tuple(range(32 // bits))
    assert torch.equal(unpack(pack(codes, bits, dim, order), bits, dim, order), codes)


@ALL
@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    axis=st.sampled_from([ROWS, COLUMNS]),
    seed=st.integers(0, 999),
)
def test_cutting_tiles_keeps_their_numbers(
    scheme: Scheme, rows: int, columns: int, axis: int, seed: int
) -> None:
    """Tiles in any order stand for those rows (columns) of W, and side by side give W's bytes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * TILE, columns * TILE, generator=generator)
    stored = scheme.quantise(weight)
    value = scheme.dequantise(stored)
    tile = math.lcm(scheme.tile(axis), 8)
    total = weight.shape[axis]
    order = torch.randperm(total // tile, generator=generator).tolist()
    picked = [n for t in order for n in range(t * tile, (t + 1) * tile)]
    part = scheme.gather(stored, axis, picked)
    assert torch.equal(scheme.dequantise(part), value.index_select(axis, torch.tensor(picked)))
    tiles = [scheme.gather(stored, axis, range(i, i + tile)) for i in range(0, total, tile)]
    assert same(scheme.join(tiles, axis, total, weight.shape[1 - axis]), stored)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in ("fp8-tiles", "plain")])
def test_rows_of_their_own_scale_go_one_by_one(name: str) -> None:
    """Rows in any order keep their codes, scales and zeros, though words are filled anew."""
    scheme = SCHEMES[name]
    stored = scheme.quantise(torch.randn(2 * TILE, TILE))
    picked = torch.randperm(2 * TILE)[:TILE]
    assert scheme.tile(ROWS) == 1
    part = scheme.gather(stored, ROWS, picked.tolist())
    assert torch.equal(scheme.dequantise(part), scheme.dequantise(stored)[picked])


@ALL
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_padding_is_zero(scheme: Scheme, axis: int) -> None:
    """What is added up to the full length stands for zeros, and for nothing else if it is all."""
    stored = scheme.quantise(torch.randn(2 * TILE, 2 * TILE))
    wide = scheme.join([stored], axis, 4 * TILE, 2 * TILE)
    value = scheme.dequantise(wide)
    first, rest = value.split(2 * TILE, dim=axis)
    assert torch.equal(first, scheme.dequantise(stored))
    assert not rest.any()
    assert not scheme.dequantise(scheme.join([], axis, TILE, TILE)).any()


@ALL
def test_quantising_is_close(scheme: Scheme) -> None:
    """Half a step of 4 bits over ±3 deviations is about a tenth of the weights' norm."""
    weight = torch.randn(4 * TILE, 4 * TILE)
    off = scheme.dequantise(scheme.quantise(weight)) - weight
    bits = scheme.bits if isinstance(scheme, Packed) else 8
    assert float(off.norm() / weight.norm()) < (0.11 if bits == 4 else 0.03)


def test_scales_stay_powers_of_two() -> None:
    """448 · 0.7 needs a scale of at least 0.7: the next power of two is 1."""
    scheme = dataclasses.replace(WHOLE, powers_of_two=True)
    stored = scheme.quantise(torch.tensor([[448.0 * 0.7, -3.0]]))
    assert stored["weight_scale"].tolist() == [1.0]
    assert scheme.dequantise(stored)[0, 1] == -3.0
    stored = scheme.quantise(torch.tensor([[448.0 / 8, 0.0]]))
    assert stored["weight_scale"].tolist() == [0.125]


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_short_last_tile_comes_last(axis: int) -> None:
    """48 neurons are a tile of 32 and one of 16; only in that order do they fit."""
    shape = (48, TILE) if axis == ROWS else (TILE, 48)
    stored = TILED.quantise(torch.randn(shape))
    assert TILED.fits(axis, range(48), 48)
    assert same(TILED.gather(stored, axis, range(48)), stored)
    assert not TILED.fits(axis, [*range(32, 48), *range(32)], 48)
    assert not TILED.fits(axis, range(1, 33), 48)
    with pytest.raises(ValueError, match="whole tiles"):
        TILED.gather(stored, axis, range(16))


def test_different_shared_scales_do_not_join() -> None:
    """Columns under one scale per row: blocks of two experts can't stand side by side."""
    one, two = (BY_ROWS.quantise(torch.randn(4, 8) * size) for size in (1, 3))
    with pytest.raises(InexactJoin, match="weight_scale"):
        BY_ROWS.join([one, two], COLUMNS, 16, 4)


@pytest.mark.parametrize(
    ("layout", "ending", "value", "message"),
    [
        ("fp8-tiles", "weight", 0x7F, "NaN or infinite"),
        ("fp8-tiles", "weight_scale_inv", math.inf, "NaN or infinite"),
        ("int4", "weight_scale", math.nan, "NaN or infinite"),
        ("gptq", "g_idx", 1, "is not what its shape implies"),
        ("gptq", "qzeros", 1, "is not what its shape implies"),
    ],
)
def test_damaged_numbers_are_named(
    layout: str, ending: str, value: float, message: str, tmp_path: Path
) -> None:
    """A NaN code, an infinite scale, reordered columns: each names its matrix."""
    quantise_model(make_model(tmp_path / "m", "qwen3_moe"), tmp_path / "q", layout)
    file = tmp_path / "q" / "model.safetensors"
    weights = load_file(file)
    prefix = "model.layers.1.mlp.experts.3.up_proj."
    tensor = weights[prefix + ending]
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8)[0, 0] = int(value)
    else:
        tensor.view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "q").weight(prefix + "weight")
    assert "experts.3.up_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", {"desc_act": True}, "desc_act"),
        ("gptq", {"bits": 3}, "packs 3 bits"),
        ("gptq", {"quant_method": "other"}, "quant_method 'other'"),
        ("awq", {"version": "gemv"}, "AWQ version 'gemv'"),
        ("fp8-tiles", {"weight_block_size": [64, 64]}, "fits no tile"),
        ("int4", {"config_groups": {}}, "packs None bits"),
        ("gptq", {"group_size": 64}, "needs I32"),
    ],
)
def test_settings_that_contradict_the_tensors(
    layout: str, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Refused when the checkpoint is opened, with the reason."""
    quantise_model(make_model(tmp_path / "m", "qwen3_moe"), tmp_path / "q", layout)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "q")


def test_a_missing_scale_is_missing(tmp_path: Path) -> None:
    """Codes without their scale are an incomplete checkpoint, not plain numbers."""
    quantise_model(make_model(tmp_path / "m", "qwen3_moe"), tmp_path / "q", "int4")
    file = tmp_path / "q" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.experts.5.down_proj.weight_scale"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match=r"down_proj\.weight_scale"):
        open_checkpoint(tmp_path / "q")


def test_lists_of_modules_follow_the_numbering() -> None:
    """Names of experts that are gone go; plain blocks are all named; the rest stays."""
    layer = "model.layers.{}.mlp.experts."
    before = {
        "modules_to_not_convert": [
            "lm_head",
            layer.format(0) + "7.up_proj",
            layer.format(1) + "7.up_proj",
            "model.layers.4.eh_proj",
            "re:.*gate$",
        ],
        "config_groups": {"a": {"targets": ["Linear", layer.format(0) + "3.up_proj"]}},
    }
    changed = [
        Renumbering(prefix=layer.format(0), count=2, plain=False),
        Renumbering(prefix=layer.format(1), count=2, plain=True),
    ]
    assert renumbered_settings(before, changed, ("model.layers.4.",)) == {
        "modules_to_not_convert": [
            "lm_head",
            layer.format(1) + "0.up_proj",
            layer.format(1) + "1.up_proj",
            "re:.*gate$",
        ],
        "config_groups": {
            "a": {
                "targets": [
                    "Linear",
                    layer.format(0) + "0.up_proj",
                    layer.format(0) + "1.up_proj",
                ]
            }
        },
    }
