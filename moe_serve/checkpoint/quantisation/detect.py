"""Which scheme stores a matrix: from the config's quantisation settings and the tensors present."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from moe_serve.checkpoint.dtypes import FLOATING
from moe_serve.checkpoint.header import TensorEntry
from moe_serve.checkpoint.quantisation.codes import WORD
from moe_serve.checkpoint.quantisation.fp8 import Fp8
from moe_serve.checkpoint.quantisation.packed import Packed
from moe_serve.checkpoint.quantisation.plain import Plain
from moe_serve.checkpoint.quantisation.scheme import Scheme
from moe_serve.errors import CheckpointError, IncompleteCheckpoint
from moe_serve.files import MISMATCH

Settings = Mapping[str, Any]

_WEIGHT: Final = "weight"
_ENDINGS: Final = frozenset(
    {
        "weight_scale_inv",
        "weight_scale",
        "weight_packed",
        "weight_zero_point",
        "weight_shape",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }
)
"""Tensors that belong to the matrix of the same prefix."""
_REFUSED: Final = {
    "input_scale": "static activation scales belong to one expert's own inputs",
    "weight_g_idx": "columns are reordered by activation (actorder)",
    "weight_global_scale": "is NVFP4",
    "weight_scale_2": "is NVFP4",
}
_REMEDY: Final = "start from the BF16 checkpoint, or from one in a supported number format"


def quantisation_settings(config: Mapping[str, Any]) -> Settings:
    """The config's ``quantization_config``; empty for plain checkpoints."""
    found = config.get("quantization_config") or {}
    return found if isinstance(found, Mapping) else {}


def logical_name(tensor: str) -> str:
    """The matrix a tensor belongs to: its prefix with ``.weight``; others stay themselves."""
    prefix, _, ending = tensor.rpartition(".")
    return f"{prefix}.{_WEIGHT}" if ending in _ENDINGS else tensor


def scheme_of(name: str, tensors: Mapping[str, TensorEntry], settings: Settings) -> Scheme:
    """The scheme of matrix ``name``.

    Args:
        name: ending in ``.weight`` (or any plain tensor).
        tensors: all of the checkpoint.
        settings: see :func:`quantisation_settings`.

    Raises:
        IncompleteCheckpoint: nothing is stored under that name.
        CheckpointError: stored in a way that can't be read.
    """
    prefix = name.removesuffix(_WEIGHT)

    def entry(ending: str) -> TensorEntry | None:
        return tensors.get(prefix + ending)

    weight = tensors.get(name)
    if prefix != name:
        for ending, reason in _REFUSED.items():
            if entry(ending) is not None:
                raise CheckpointError(
                    f"cannot be pruned: {reason}", where=prefix + ending, remedy=_REMEDY
                )
        if (packed := entry("weight_packed")) is not None:
            return _compressed(prefix, tensors, packed, settings)
        if (packed := entry("qweight")) is not None:
            return _gptq_or_awq(prefix, tensors, packed, settings)
        if (scale := entry("weight_scale_inv") or entry("weight_scale")) is not None:
            return _fp8(name, weight, scale, settings)
    if weight is None:
        raise IncompleteCheckpoint(
            f"no shard holds tensor {name!r}",
            remedy=MISMATCH,
            where="model.safetensors.index.json",
        )
    if weight.dtype not in FLOATING:
        raise CheckpointError(
            f"is {weight.dtype} without a scale", where=name, remedy="fetch index and shards again"
        )
    return Plain(dtype=weight.dtype)


def _fp8(name: str, weight: TensorEntry | None, scale: TensorEntry, settings: Settings) -> Scheme:
    if weight is None or weight.dtype != "F8_E4M3" or scale.dtype not in FLOATING:
        found = weight.dtype if weight else "nothing"
        raise CheckpointError(
            f"its codes are {found}, its scale is {scale.dtype}; FP8 E4M3 is what can be read",
            where=name,
            remedy=_REMEDY,
        )
    rows, columns = weight.shape
    tile = _tile_size(name, settings)
    steps: tuple[int | None, int | None]
    if tile is not None and len(scale.shape) == 2:
        steps = tile
    elif scale.shape in {(rows, 1), (rows,)}:
        steps = (1, None)
    elif scale.shape in {(), (1,), (1, 1)}:
        steps = (None, None)
    else:
        raise _odd(name, scale)
    scheme = Fp8(
        scale=scale.name.rpartition(".")[2],
        scale_dtype=scale.dtype,
        scale_dims=len(scale.shape),
        row_step=steps[0],
        column_step=steps[1],
        powers_of_two=settings.get("scale_fmt") == "ue8m0",
    )
    if scheme.pieces[1].shape(rows, columns) != scale.shape:
        raise _odd(name, scale)
    return scheme


def _odd(name: str, scale: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"its scale is {list(scale.shape)}, which fits no tile the config names",
        where=name,
        remedy=MISMATCH,
    )


def _tile_size(name: str, settings: Settings) -> tuple[int, int] | None:
    size = settings.get("weight_block_size")
    if size is None and settings.get("quant_method") == "compressed-tensors":
        size = _weights(name, settings).get("block_structure")
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    return int(size[0]), int(size[1])


def _weights(name: str, settings: Settings) -> Mapping[str, Any]:
    """compressed-tensors' settings of the weights of module ``name``.

    A group that names the module (or matches it by a regular expression) comes before one that
    names its class.
    """
    module = name.removesuffix(f".{_WEIGHT}")
    by_class: Mapping[str, Any] = {}
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        for target in group.get("targets") or ():
            if target == module or (
                target.startswith("re:") and re.match(target.removeprefix("re:"), module)
            ):
                return dict(weights)
        by_class = by_class or weights
    return by_class


def _compressed(
    prefix: str, tensors: Mapping[str, TensorEntry], packed: TensorEntry, settings: Settings
) -> Scheme:
    weights = _weights(prefix + _WEIGHT, settings)
    scale = _needed(prefix + "weight_scale", tensors)
    shape = tensors.get(prefix + "weight_shape")
    zero = prefix + "weight_zero_point" in tensors
    bits = _bits(packed.name, weights.get("num_bits"))
    group = weights.get("group_size")
    scheme = Packed(
        layout="compressed-tensors",
        bits=bits,
        group=int(group) if isinstance(group, int) and group > 0 else None,
        scale_dtype=scale.dtype,
        symmetric=not zero,
        stored_zero=zero,
        shape_dtype=shape.dtype if shape else None,
    )
    return _checked(prefix, scheme, tensors)


def _gptq_or_awq(
    prefix: str, tensors: Mapping[str, TensorEntry], packed: TensorEntry, settings: Settings
) -> Scheme:
    method = settings.get("quant_method")
    bits = _bits(packed.name, settings.get("bits", settings.get("w_bit")))
    group = settings.get("group_size", settings.get("q_group_size"))
    scale = _needed(prefix + "scales", tensors)
    layout: Literal["AWQ", "GPTQ"]
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm" or bits != 4:
            raise CheckpointError(
                f"AWQ version {version!r} at {bits} bits", where=packed.name, remedy=_REMEDY
            )
        layout, offset = "AWQ", 0
        symmetric = not settings.get("zero_point", True)
    elif method == "gptq":
        if settings.get("desc_act"):
            raise CheckpointError(
                "desc_act orders columns by activation, so neurons share no whole groups",
                where=packed.name,
                remedy="use a GPTQ checkpoint made with desc_act=false, or " + _REMEDY,
            )
        layout = "GPTQ"
        offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        symmetric = bool(settings.get("sym", True))
    else:
        raise CheckpointError(
            f"holds qweight, but config.json says quant_method {method!r}",
            where=packed.name,
            remedy="restore quantization_config in config.json",
        )
    scheme = Packed(
        layout=layout,
        bits=bits,
        group=int(group) if isinstance(group, int) and group > 0 else None,
        scale_dtype=scale.dtype,
        symmetric=symmetric,
        stored_zero=True,
        zero_offset=offset,
        group_index=prefix + "g_idx" in tensors,
    )
    return _checked(prefix, scheme, tensors)


def _bits(name: str, value: Any) -> int:
    if value not in {4, 8}:
        raise CheckpointError(f"packs {value!r} bits, not 4 or 8", where=name, remedy=_REMEDY)
    return int(value)


def _needed(name: str, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    if name not in tensors:
        raise IncompleteCheckpoint(
            f"no shard holds tensor {name!r}",
            remedy="fetch index and shards again",
            where="model.safetensors.index.json",
        )
    return tensors[name]


def _checked(prefix: str, scheme: Packed, tensors: Mapping[str, TensorEntry]) -> Scheme:
    """All pieces are there, of one logical shape."""
    entries = {p.ending: _needed(prefix + p.ending, tensors) for p in scheme.pieces}
    rows, columns = scheme.shape_of({ending: e.shape for ending, e in entries.items()})
    if columns % (scheme.group or 1) or (scheme.stored_zero and rows % (WORD // scheme.bits)):
        raise CheckpointError(
            f"[{rows}, {columns}] is not made of whole groups of {scheme.name}",
            where=prefix,
            remedy=_REMEDY,
        )
    for piece in scheme.pieces:
        entry = entries[piece.ending]
        if entry.dtype != piece.dtype or entry.shape != piece.shape(rows, columns):
            raise CheckpointError(
                f"is {entry.dtype} {list(entry.shape)}, {scheme.name} of [{rows}, {columns}] "
                f"needs {piece.dtype} {list(piece.shape(rows, columns))}",
                where=entry.name,
                remedy=MISMATCH,
            )
    return scheme
