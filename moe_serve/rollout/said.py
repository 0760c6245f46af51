"""Sentences of the controller: text in English that remembers what it says, for other languages.

What is decided is told by commands, in the log, on the page and to hooks. Everywhere it is this
text; where a reader has chosen a language, the same is said from its code and values. The catalogue
``said.toml`` beside this file has each sentence in every language.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, Final

Codes = dict[str, Any]
"""``{"code": ..., VALUE: ...}``; values are numbers, texts, other sentences' codes, or lists."""
Names = Callable[[str], str]
"""What a guard is called."""

_SPANS: Final = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0))
_JOIN: Final = "join"
_BETWEEN: Final = {"guard": "comma", "variant": "and"}


class Said(str):
    """A sentence in English, with its code and values."""

    __slots__ = ("code", "values")
    code: str
    values: Mapping[str, Any]

    @property
    def codes(self) -> Codes:
        """For the record: :func:`in_language` says it again."""
        return {"code": self.code, **{name: _plain(value) for name, value in self.values.items()}}


def say(code: str, **values: Any) -> Said:
    """The sentence of a code.

    Args:
        code: of the catalogue.
        values: what its braces name; sentences, lists of them or of names, numbers, texts.
    """
    said = Said(in_language({"code": code, **{k: _plain(v) for k, v in values.items()}}, "en"))
    said.code, said.values = code, values
    return said


def join(parts: Sequence[str]) -> str:
    """Several sentences as one; a single one stays what it is, none is empty."""
    return parts[0] if len(parts) == 1 else say(_JOIN, parts=list(parts)) if parts else ""


def codes(text: str) -> Codes | None:
    """Of a sentence; ``None`` for what a person wrote."""
    return text.codes if isinstance(text, Said) else None


def parts(found: Codes) -> list[Codes]:
    """The sentences that were joined."""
    return list(found["parts"]) if found["code"] == _JOIN else [found]


def in_language(found: Codes | str, language: str, names: Names = str) -> str:
    """A sentence in a language of the catalogue.

    Args:
        found: its codes; text that has none is given back.
        language: ``en`` or ``ja``.
        names: what guards are called there.
    """
    if isinstance(found, str):
        return found
    values = {name: value for name, value in found.items() if name != "code"}
    template = _catalogue()[found["code"]][language]
    return _Speaker(language, names).vformat(template, (), values)


class _Speaker(Formatter):
    """Fills in what a language says in its own way."""

    def __init__(self, language: str, names: Names) -> None:
        self._language, self._names = language, names

    def format_field(self, value: Any, format_spec: str) -> Any:
        """``:span`` is a length of time, ``:guard`` a guard, ``:variant`` a variant."""
        if isinstance(value, list):
            between = self._words(_BETWEEN.get(format_spec, "also"))
            return between.join(self.format_field(each, format_spec) for each in value)
        if isinstance(value, dict):
            return in_language(value, self._language, self._names)
        if format_spec == "guard":
            return self._names(value)
        if format_spec == "variant":
            return self._words(value)
        if format_spec == "span":
            return self._span(float(value))
        return super().format_field(value, format_spec)

    def _span(self, seconds: float) -> str:
        for unit, size in _SPANS:
            if seconds >= 2.0 * size:
                return f"{seconds / size:.0f}{self._words(unit)}"
        return f"{max(seconds, 1.0):.0f}{self._words('seconds')}"

    def _words(self, code: str) -> str:
        return _catalogue()[code][self._language]


def _plain(value: Any) -> Any:
    if isinstance(value, Said):
        return value.codes
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return [_plain(each) for each in value]
    return value


@lru_cache
def _catalogue() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
