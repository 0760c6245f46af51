"""Sentences that remember what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from moe_serve.rollout import said
from moe_serve.rollout.said import codes, in_language, join, parts, say

FOLDER = Path(said.__file__).parent
CATALOGUE = said._catalogue()


def braces(text: str) -> set[str]:
    """Names of the values that a template takes."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("code", CATALOGUE)
def test_every_language_says_the_same_things(code: str) -> None:
    """The same values in each."""
    assert set(CATALOGUE[code]) == {"en", "ja"}
    assert braces(CATALOGUE[code]["en"]) == braces(CATALOGUE[code]["ja"])


def test_no_sentence_is_missing_and_none_is_left_over() -> None:
    """What the controller's modules say by name is in the catalogue, and nothing else is."""
    text = "\n".join(file.read_text() for file in FOLDER.glob("*.py"))
    quoted = set(re.findall(r'"([a-z0-9-]+)"', text))
    assert set(re.findall(r'\bsay\(\s*"([a-z0-9-]+)"', text)) <= set(CATALOGUE)
    # Names made of two parts: "more" and "minimum", each "-stalled" too.
    assert set(CATALOGUE) - quoted == {"more-stalled", "minimum-stalled"}


def test_it_survives_the_record_and_speaks_japanese() -> None:
    """Nested, with a guard's name, a span and variants; through JSON, where it is plain text."""
    missing = join([say("min-time", span=600), say("no-answers", who=["original", "pruned"])])
    text = say("inconclusive", span=7200.0, missing=missing)
    assert text == (
        "no verdict after 2 hours: 10 minutes of the minimum time; "
        "answers of original and pruned: none yet"
    )
    kept: dict[str, Any] = json.loads(json.dumps({"words": text, "codes": text.codes}))
    assert kept["words"] == text
    assert in_language(kept["codes"], "en") == text
    assert in_language(kept["codes"], "ja") == (
        "2時間たっても判定できません: 最短時間まであと10分。"
        "オリジナルと枝刈り版の応答がまだありません"
    )


def test_guards_have_the_names_of_where_they_are_shown() -> None:
    """Commands show what a policy calls them; a page has names of its own."""
    text = say("fine", guards=["errors", "ttft"])
    assert text == "harm is excluded by errors, ttft"
    assert in_language(text.codes, "en", str.upper) == "harm is excluded by ERRORS, TTFT"


def test_one_sentence_is_not_a_list_of_one() -> None:
    """And a person's own words have no codes."""
    assert join([]) == ""
    assert join([say("clock")]) == "the clock jumped"
    assert parts(say("clock").codes) == [{"code": "clock"}]
    assert len(parts(codes(join([say("clock"), say("gate")])) or {})) == 2
    assert codes("because I say so") is None
    assert in_language("because I say so", "ja") == "because I say so"
