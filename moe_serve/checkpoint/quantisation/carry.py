"""Quantisation settings of a checkpoint whose experts have been renumbered."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_LEFT_OUT: Final = ("modules_to_not_convert", "ignored_layers", "ignore")
"""Settings that list modules which are not quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Renumbering:
    """One changed layer."""

    prefix: str
    """What its experts' modules begin with, up to the number."""
    count: int
    """Experts (or blocks) that it stores now."""
    plain: bool
    """Whether they are plain numbers."""


def renumbered_settings(
    settings: Mapping[str, Any], layers: Iterable[Renumbering], gone: tuple[str, ...]
) -> dict[str, Any]:
    """The settings with every list of modules true of what is stored now.

    An entry that names an expert of a changed layer names, afterwards, every expert that the
    layer stores; in a list of unquantised modules only where the layer is plain. Entries of layers
    that are not stored any more go. Regular expressions, classes and other modules stay.

    Args:
        settings: the config's ``quantization_config``.
        layers: those that changed.
        gone: prefixes of modules that are not stored any more.
    """
    changed = tuple(layers)
    result = copy.deepcopy(dict(settings))
    for key in _LEFT_OUT:
        if isinstance(result.get(key), list):
            plain = tuple(layer for layer in changed if layer.plain)
            result[key] = _rename(result[key], changed, plain, gone)
    for group in (result.get("config_groups") or {}).values():
        if isinstance(group.get("targets"), list):
            group["targets"] = _rename(group["targets"], changed, changed, gone)
    return result


def _rename(
    names: list[str],
    changed: tuple[Renumbering, ...],
    listed: tuple[Renumbering, ...],
    gone: tuple[str, ...],
) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        if gone and f"{name}.".startswith(gone):
            continue
        layer = next((i for i in changed if re.match(rf"{re.escape(i.prefix)}\d", name)), None)
        if layer is None:
            found[name] = None
        elif layer in listed:
            rest = re.sub(r"^\d+", "", name.removeprefix(layer.prefix))
            found |= dict.fromkeys(f"{layer.prefix}{number}{rest}" for number in range(layer.count))
    return list(found)
