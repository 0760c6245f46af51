"""safetensors element types and their torch counterparts."""

from __future__ import annotations

from typing import Final

import torch

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

UNREAD: Final = frozenset(
    {
        *("U16", "U32", "U64", "C64"),
        *("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
    }
)
"""Element types that safetensors files have too; none of the number formats read here uses them."""

DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}

FLOATING: Final = frozenset({"F64", "F32", "F16", "BF16"})
"""Formats whose elements can be averaged, re-fitted and cut freely."""


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return TORCH_DTYPES[dtype].itemsize
