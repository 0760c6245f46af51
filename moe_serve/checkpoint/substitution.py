"""vLLM's own format for experts that are replaced by a constant (from 0.33 on).

``config.json`` lists them as ``"approximate_experts": {"<layer>": [ids]}`` under the original
architecture. The router keeps all its rows and its weights; a replaced expert adds its weight times
the vector ``<experts prefix>.<id>.approx_value`` [D]; those that stay keep their ids in tensor
names. At least one stays in each layer.

Followed as of vLLM commit 19a527a (``layers/fused_moe/expert_substitution.py``). The other way to
declare the same, ``compression_config.transform_config.expert_substitution``, is refused: that
version takes one or the other, and names constants freely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from moe_serve.checkpoint.table import CompactTable, LayerTable
from moe_serve.errors import CheckpointError
from moe_serve.families import Family, Shape

KEY: Final = "approximate_experts"
_SUFFIX: Final = "approx_value"


def constant_name(family: Family, layer: int, expert: int) -> str:
    """The tensor that holds a replaced expert's output."""
    return f"{family.expert_prefix(layer)}{expert}.{_SUFFIX}"


def retained(replaced: Iterable[int], experts: int) -> tuple[int, ...]:
    """The ids that stay, ascending."""
    gone = set(replaced)
    return tuple(e for e in range(experts) if e not in gone)


def replaced_table(replaced: Iterable[int], *, experts: int, width: int) -> LayerTable:
    """One block for each expert that stays, none for the others; all can be selected."""
    place = {expert: block for block, expert in enumerate(retained(replaced, experts))}
    return LayerTable(
        width=width,
        blocks=len(place),
        experts=tuple((place[e],) if e in place else () for e in range(experts)),
    )


def to_config(replaced: Mapping[int, tuple[int, ...]]) -> dict[str, list[int]]:
    """The value of ``approximate_experts``."""
    return {str(layer): sorted(ids) for layer, ids in sorted(replaced.items()) if ids}


def parse_replaced(
    config: Mapping[str, Any], family: Family, *, where: str
) -> dict[int, tuple[int, ...]]:
    """The ids that are replaced in each layer, ascending; empty where nothing is.

    Raises:
        CheckpointError: naming every defect at once.
    """
    _refuse_other(config, where)
    value = config.get(KEY)
    if value is None:
        return {}
    layers = value if isinstance(value, Mapping) else {}
    defects = [] if isinstance(value, Mapping) else ["it is not a mapping from layers to ids"]
    experts, moe_layers = family.shape(config).experts, set(family.moe_layers(config))
    found: dict[int, tuple[int, ...]] = {}
    for key, ids in layers.items():
        if not str(key).isdecimal() or int(key) not in moe_layers:
            defects.append(f"layer {key}: no layer with experts has this index")
        elif not isinstance(ids, list) or not all(type(e) is int for e in ids):
            defects.append(f"layer {key}: not a list of expert ids")
        elif len(set(ids)) != len(ids) or not all(0 <= e < experts for e in ids):
            defects.append(f"layer {key}: ids must differ and lie below {experts}")
        elif len(ids) == experts:
            defects.append(f"layer {key}: at least one expert must stay")
        elif ids:
            found[int(key)] = tuple(sorted(ids))
    if "compact_experts" in config:
        defects.append("the config also has compact_experts")
    if defects:
        raise CheckpointError(
            f"{KEY} is damaged: " + "; ".join(defects),
            where=where,
            remedy="restore config.json from the pruner's output, or prune again",
        )
    return found


def _refuse_other(config: Mapping[str, Any], where: str) -> None:
    """Constants that are declared in the other of the two ways."""
    inner: Any = config
    for key in ("compression_config", "transform_config", "expert_substitution"):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    if inner is not None:
        raise CheckpointError(
            "declares replaced experts as compression_config.transform_config.expert_substitution",
            where=where,
            remedy=f"declare them as {KEY}, the only way that is read here",
        )


def replaced_tables(replaced: Mapping[int, tuple[int, ...]], shape: Shape) -> CompactTable:
    """The remapping that such a checkpoint amounts to, constants apart."""
    return CompactTable(
        layers={
            layer: replaced_table(ids, experts=shape.experts, width=shape.width)
            for layer, ids in replaced.items()
        }
    )
