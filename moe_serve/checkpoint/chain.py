"""A record's fields, each hashed together with all before it: an edit is seen, and where it is.

Not a signature: who edits a record can make the chain anew. Whoever needs more than that notes the
last link (:func:`seal`) elsewhere, or signs the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

CHAIN: Final = "chain"
"""The field that holds the links."""


def links(content: Mapping[str, Any]) -> dict[str, str]:
    """Field → SHA-256 of the link before it, its name and its value, by name."""
    found: dict[str, str] = {}
    last = ""
    for name in sorted(content.keys() - {CHAIN}):
        line = json.dumps([last, name, content[name]], sort_keys=True, ensure_ascii=True)
        found[name] = last = hashlib.sha256(line.encode()).hexdigest()
    return found


def chained(content: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its links."""
    return {**content, CHAIN: links(content)}


def seal(content: Mapping[str, Any]) -> str | None:
    """The last link, which stands for all of the record; ``None``: it holds none."""
    kept = content.get(CHAIN) or {}
    return kept[max(kept)] if kept else None


def broken(content: Mapping[str, Any], where: str) -> list[str]:
    """What was edited, added or taken away since the links were made; one line."""
    kept, now = content.get(CHAIN), links(content)
    if not isinstance(kept, Mapping) or not kept:
        return [f"{where} holds no chain of hashes"]
    if dict(kept) == now:
        return []
    names = sorted(kept.keys() | now.keys())
    first = next(name for name in names if kept.get(name) != now.get(name))
    return [f"{where} was edited: its chain of hashes breaks at {first}"]
