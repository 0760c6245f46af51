"""The page's words in English and Japanese, and its figures."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from moe_serve.rollout.said import Codes, in_language

LANGUAGES: Final = {"en": "English", "ja": "日本語"}

_WORDS: Final[Mapping[str, Mapping[str, str]]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
_MINUS: Final = "\N{MINUS SIGN}"
_UNKNOWN: Final = "\N{EN DASH}"


class Words:
    """One language."""

    def __init__(self, language: str) -> None:
        """``en`` or ``ja``."""
        self.language = language

    def __call__(self, key: str, **values: object) -> str:
        """The words of a key; what has none, such as a new guard, is shown as it is called."""
        found = _WORDS.get(key)
        text = found[self.language] if found is not None else key.partition("-")[2] or key
        return text.format(**values) if values else text

    def say(self, found: Codes | None, english: str) -> str:
        """A sentence of the controller's; as it is where it is a person's."""
        if found is None:
            return english
        return in_language(found, self.language, lambda guard: self(f"guard-{guard}"))

    def knows(self, key: str) -> bool:
        """Whether it has words of its own."""
        return key in _WORDS

    def span(self, seconds: float) -> str:
        """A length of time, in its two largest units at most."""
        days, hours, minutes = (int(seconds // size) for size in (86_400, 3600, 60))
        japanese = self.language == "ja"
        if days:
            return f"{days}日{hours % 24}時間" if japanese else f"{days} d {hours % 24} h"
        if hours:
            return f"{hours}時間{minutes % 60}分" if japanese else f"{hours} h {minutes % 60} min"
        if minutes:
            return f"{minutes}分" if japanese else f"{minutes} min"
        return f"{max(seconds, 0.0):.0f}秒" if japanese else f"{max(seconds, 0.0):.0f} s"


def preferred(asked: str | None, accept: str) -> str:
    """The language to answer in: the one asked for, else the first known one a browser accepts."""
    if asked in LANGUAGES:
        return str(asked)
    ranked = []
    for place, part in enumerate(accept.split(",")):
        name, _, weight = part.strip().partition(";q=")
        try:
            rank = float(weight or 1.0)
        except ValueError:
            continue
        ranked.append((-rank, place, name.split("-")[0].lower()))
    return next((name for _, _, name in sorted(ranked) if name in LANGUAGES), "en")


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return _UNKNOWN
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20)):
        if value >= scale:
            return f"{value / scale:,.{0 if value >= 100 * scale else 1}f} {unit}"
    return f"{value / 2.0**10:,.0f} KiB"


def count(value: float | None) -> str:
    """A number of things, or of things a second."""
    if value is None:
        return _UNKNOWN
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:,.1f}"


def short(seconds: float | None) -> str:
    """A latency."""
    if seconds is None:
        return _UNKNOWN
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{1000.0 * seconds:,.0f} ms"


def percent(share: float | None) -> str:
    """A share of one."""
    return _UNKNOWN if share is None else f"{100.0 * share:.2f} %"


def change(before: float | None, after: float | None) -> str:
    """How much more or less, in percent."""
    if before is None or after is None or before <= 0.0:
        return _UNKNOWN
    return signed(100.0 * (after / before - 1.0), 0) + " %"


def signed(value: float, digits: int) -> str:
    """With a sign that is not a hyphen; none for what rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return f"{_MINUS if value < 0 else '+'}{text}"


def moment(at: float) -> tuple[str, str]:
    """A time for machines, and for people without a script that knows their time zone."""
    found = datetime.fromtimestamp(at, UTC)
    return found.isoformat(timespec="seconds"), found.strftime("%Y-%m-%d %H:%M:%S UTC")
