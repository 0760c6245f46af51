"""Numbers as people read them; the same in every language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes with a binary unit."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def percent(share: float) -> str:
    """With one decimal, without it where it says nothing."""
    text = f"{100 * share:.1f}"
    return text.removesuffix(".0") + " %"


def number(count: float) -> str:
    """Thousands set apart."""
    return f"{count:,.0f}"


def short(value: float | None) -> str:
    """Three digits; nothing where nothing is known."""
    return "" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def measured(value: float, share: bool) -> str:
    """A task's figure: of a share of right answers in per cent."""
    return f"{100 * value:.1f}" if share else f"{value:.3g}"


def apart(row: Mapping[str, Any]) -> str:
    """A paired difference with the reach of its interval, as in ``-0.8 ± 0.5``."""
    share = row["only_original"] is not None
    found = measured(row["difference"], share)
    if float(found) == 0:
        found = found.removeprefix("-")
    elif row["difference"] > 0:
        found = f"+{found}"
    interval = row["interval"]
    return found if interval is None else f"{found} ± {measured(interval['half'], share)}"


def counted(row: Mapping[str, Any]) -> str:
    """A task's items, and in brackets all there are where some have no number."""
    return number(row["items"]) + (
        f" ({row['items'] + row['left_out']})" if row["left_out"] else ""
    )


def of_unit(name: str, value: float | None) -> str:
    """A value in the unit that its name ends in; nothing where nothing is known."""
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:.3g} s" if name.endswith("_seconds") else number(value)
