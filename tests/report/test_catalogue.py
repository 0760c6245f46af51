"""Both languages say the same things."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

import moe_serve.report
from moe_serve.errors import UsageError
from moe_serve.evaluation import memory
from moe_serve.evaluation.paired import VERDICTS
from moe_serve.evaluation.results import DEFINITIONS
from moe_serve.report.catalogue import LANGUAGES, Catalogue
from moe_serve.report.facts import STATES

PACKAGE = Path(moe_serve.report.__file__).parent


def fields(sentence: str) -> set[str | None]:
    """Placeholders of a sentence."""
    return {field for _, field, _, _ in Formatter().parse(sentence) if field is not None}


def test_catalogues_have_the_same_keys_and_placeholders() -> None:
    """A figure that one language names, the other names too."""
    english, japanese = (Catalogue.of(language).messages for language in LANGUAGES)
    assert {k: fields(s) for k, s in english.items()} == {k: fields(s) for k, s in japanese.items()}


def test_every_sentence_is_used_and_every_use_has_one() -> None:
    """Keys in templates and code against those in the catalogue."""
    sources = [*PACKAGE.glob("*.py"), *(PACKAGE / "templates").glob("*.html")]
    text = "\n".join(file.read_text() for file in sources)
    used = set(re.findall(r"""\bt\(\s*["']([a-z_0-9]+)["']\s*[,)]""", text))
    used |= set(re.findall(r't\("([a-z_]+)" if ', text))
    used |= set(re.findall(r't\("[a-z_]+" if [a-z.]+ else "([a-z_]+)"', text))
    used |= {f"state_{state}" for state in STATES}
    used |= {f"term_{state}" for state in STATES if state != "whole"}
    used |= {f"held{kind}_{name}" for name in memory.DEFINITIONS for kind in ("", "_name")}
    used |= {f"speed_{name}" for name in DEFINITIONS}
    used |= {f"compare_is_{verdict}" for verdict in VERDICTS}
    used |= {f"similarity_{measure}" for measure in ("cosine", "similarity", "distance")}
    assert used == set(Catalogue.of("en").messages)


def test_an_unknown_language_is_refused() -> None:
    """With those there are."""
    with pytest.raises(UsageError, match="choose from en, ja"):
        Catalogue.of("fr")
