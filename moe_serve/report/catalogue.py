"""A page's sentences, one JSON file per language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from moe_serve.errors import UsageError

LANGUAGES: Final = ("en", "ja")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Sentences by key, with ``{placeholders}``."""

    language: str
    messages: dict[str, str]

    @classmethod
    def of(cls, language: str, package: str = "moe_serve.report") -> Catalogue:
        """Read one; ``package`` is whose sentences they are.

        Raises:
            UsageError: there is none for the language.
        """
        if language not in LANGUAGES:
            raise UsageError(
                f"no language {language!r}",
                where="--lang",
                remedy=f"choose from {', '.join(LANGUAGES)}",
            )
        text = (files(package) / "messages" / f"{language}.json").read_text("utf-8")
        return cls(language, json.loads(text))

    def __call__(self, key: str, **values: Any) -> str:
        """The sentence; an unknown key or a missing value is an error."""
        return self.messages[key].format(**values)
