"""Quantised twins of tiny models, made by plain loops and hand-written bit arithmetic.

Nothing here comes from the product: a mistake in its layouts can't hide. Tiles and groups are 32
wide, so that tiny experts have several.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TILE = 32
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts the i-th of eight codes: the inverse of its published order 0 2 4 6 1 3 5 7."""
Stored = dict[str, torch.Tensor]
Quantised = tuple[Stored, torch.Tensor]


def e4m3_value(byte: int) -> float:
    """One sign, four exponent (bias 7) and three mantissa bits; 0x7F is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_E4M3 = torch.tensor([e4m3_value(byte) for byte in range(0x7F)])


def _fp8_codes(scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and values nearest to each number."""
    index = (scaled.abs()[..., None] - _E4M3).abs().argmin(dim=-1)
    negative = scaled < 0
    values = torch.where(negative, -_E4M3[index], _E4M3[index])
    return (index + 128 * negative).to(torch.uint8), values


def _fp8(weight: torch.Tensor, tall: int, wide: int) -> tuple[Stored, torch.Tensor]:
    """Codes, and one FP32 scale for every tile of ``tall`` × ``wide``."""
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    values = torch.zeros(rows, columns)
    scales = torch.zeros(-(-rows // tall), -(-columns // wide))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
            scales[i, j] = weight[at].abs().max() / 448.0
            codes[at], found = _fp8_codes(weight[at] / scales[i, j])
            values[at] = found * scales[i, j]
    return {"weight": codes.view(torch.float8_e4m3fn), "scale": scales}, values


def fp8_tiles(weight: torch.Tensor) -> Quantised:
    """As DeepSeek-V3 stores it."""
    found, values = _fp8(weight, TILE, TILE)
    return {"weight": found["weight"], "weight_scale_inv": found["scale"]}, values


def fp8_rows(weight: torch.Tensor) -> Quantised:
    """As compressed-tensors stores it per channel."""
    found, values = _fp8(weight, 1, weight.shape[1])
    return {"weight": found["weight"], "weight_scale": found["scale"]}, values


def fp8_whole(weight: torch.Tensor) -> Quantised:
    """One scale for the matrix."""
    found, values = _fp8(weight, *weight.shape)
    return {"weight": found["weight"], "weight_scale": found["scale"].reshape(1)}, values


def integer_codes(
    weight: torch.Tensor, *, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[list[list[int]], list[list[int]], torch.Tensor, torch.Tensor]:
    """Codes, zeros per row and group, scales [rows, groups], and the values they stand for."""
    rows, columns = weight.shape
    groups, top = columns // TILE, (1 << bits) - 1
    codes = [[0] * columns for _ in range(rows)]
    zeros = [[0] * groups for _ in range(rows)]
    scales = torch.zeros(rows, groups, dtype=dtype)
    values = torch.zeros(rows, columns)
    for row in range(rows):
        numbers = weight[row].tolist()
        for group in range(groups):
            part = numbers[group * TILE : (group + 1) * TILE]
            low, high = min(*part, 0.0), max(*part, 0.0)
            wanted = max(-low, high) * 2 / top if symmetric else (high - low) / top
            scales[row, group] = wanted
            scale = float(scales[row, group])
            zero = 1 << (bits - 1) if symmetric else min(max(round(-low / scale), 1), top)
            zeros[row][group] = zero
            for place, number in enumerate(part):
                code = min(max(round(number / scale) + zero, 0), top)
                codes[row][group * TILE + place] = code
                values[row, group * TILE + place] = (code - zero) * scale
    return codes, zeros, scales, values


def word_of(codes: list[int], bits: int, places: tuple[int, ...] | None = None) -> int:
    """Codes of one 32-bit word, the i-th at place ``places[i]``, as a signed integer."""
    word = 0
    for number, code in enumerate(codes):
        word |= code << (bits * (places[number] if places else number))
    return word - (1 << 32) if word >= 1 << 31 else word


def _words(
    table: list[list[int]], bits: int, places: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Pack along each row."""
    each = 32 // bits
    packed = [
        [word_of(row[i : i + each], bits, places) for i in range(0, len(row), each)]
        for row in table
    ]
    return torch.tensor(packed, dtype=torch.int32)


def _turned(table: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*table, strict=True)]


def compressed(
    bits: int = 4, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Callable[[torch.Tensor], Quantised]:
    """compressed-tensors, pack-quantized: codes along columns, zeros along rows."""

    def quantise(weight: torch.Tensor) -> Quantised:
        found = integer_codes(weight, bits=bits, symmetric=symmetric, dtype=dtype)
        codes, zeros, scales, values = found
        stored = {
            "weight_packed": _words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(list(weight.shape), dtype=torch.int64),
        }
        if not symmetric:
            stored["weight_zero_point"] = _words(_turned(zeros), bits).T.contiguous()
        return stored, values

    return quantise


def gptq(
    bits: int = 4, *, symmetric: bool = True, offset: int = 1
) -> Callable[[torch.Tensor], Quantised]:
    """GPTQ: codes along columns but transposed, zeros stored less ``offset``."""

    def quantise(weight: torch.Tensor) -> Quantised:
        found = integer_codes(weight, bits=bits, symmetric=symmetric, dtype=torch.float16)
        codes, zeros, scales, values = found
        less = [[zero - offset for zero in row] for row in zeros]
        columns = weight.shape[1]
        return {
            "qweight": _words(codes, bits).T.contiguous(),
            "qzeros": _words(_turned(less), bits),
            "scales": scales.T.contiguous(),
            "g_idx": torch.tensor([i // TILE for i in range(columns)], dtype=torch.int32),
        }, values

    return quantise


def awq(weight: torch.Tensor) -> Quantised:
    """AWQ: codes and zeros along rows, interleaved, transposed."""
    found = integer_codes(weight, bits=4, symmetric=False, dtype=torch.float16)
    codes, zeros, scales, values = found
    return {
        "qweight": _words(_turned(codes), 4, AWQ_PLACES),
        "qzeros": _words(_turned(zeros), 4, AWQ_PLACES),
        "scales": scales.T.contiguous(),
    }, values


def _group(weights: dict[str, Any], form: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _integers(bits: int, *, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": TILE}
    return _group(weights | {"symmetric": symmetric}, "pack-quantized")


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": TILE, "desc_act": False, "sym": True}
_FP8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], Quantised], dict[str, Any]]] = {
    "fp8-tiles": (
        fp8_tiles,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "fp8-rows": (fp8_rows, _group(_FP8_ROWS, "float-quantized")),
    "fp8-whole": (fp8_whole, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "int4": (compressed(), _integers(4, symmetric=True)),
    "int4-zeros": (compressed(symmetric=False), _integers(4, symmetric=False)),
    "int8": (compressed(8), _integers(8, symmetric=True)),
    "gptq": (gptq(), _GPTQ | {"checkpoint_format": "gptq"}),
    "gptq-zeros": (gptq(symmetric=False), _GPTQ | {"sym": False}),
    "gptq-v2": (gptq(offset=0), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": TILE,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}
"""By name: one matrix's quantiser, and the config's settings."""


def quantise_model(source: Path, target: Path, layout: str) -> dict[str, torch.Tensor]:
    """Write ``source`` with attention and experts quantised.

    Returns:
        What every quantised matrix stands for, by the original's tensor name.
    """
    quantise, settings = LAYOUTS[layout]
    weights = load_file(source / "model.safetensors")
    written: Stored = {}
    values: Stored = {}
    for name, weight in weights.items():
        prefix, _, ending = name.rpartition(".")
        linear = ending == "weight" and weight.ndim == 2 and ".layers." in name
        if not linear or prefix.endswith((".gate", ".shared_expert_gate")):
            written[name] = weight
            continue
        stored, values[name] = quantise(weight.float())
        written |= {f"{prefix}.{piece}": tensor for piece, tensor in stored.items()}
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config))
    return values
