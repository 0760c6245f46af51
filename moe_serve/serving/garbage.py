"""Answers that no one wants, told from the text alone: empty, looping, in a foreign script, broken.

Crude on purpose: both variants are judged alike and only the difference counts, so that a text
which rightly repeats itself is no evidence against anyone.
"""

from __future__ import annotations

import unicodedata
from typing import Final, Literal

Flaw = Literal["", "empty", "loop", "script", "broken"]

_SHORT: Final = 24
"""Characters below which nothing is called a loop."""
_LETTERS: Final = 10
"""Letters from which on a script can be named."""
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_EAST: Final = {"CJK": "EAST", "HIRAGANA": "EAST", "KATAKANA": "EAST", "FULLWIDTH": "LATIN"}
"""Japanese is written in several scripts at once."""


def flaw(answer: str, prompt: str) -> Flaw:
    """What is wrong with an answer; ``""`` where nothing is.

    Args:
        answer: what was generated.
        prompt: what it goes on from, whose scripts it should keep to.
    """
    if not answer.strip():
        return "empty"
    # A token that ends within a character leaves one at the end of any answer.
    if answer.rstrip(_REPLACEMENT).count(_REPLACEMENT) > 0.1 * len(answer):
        return "broken"
    if loops(answer):
        return "loop"
    return "script" if _drifts(answer, prompt) else ""


def loops(text: str) -> bool:
    """Whether its end repeats one period at least three times, over at least half of the text."""
    text = text.rstrip()
    size = len(text)
    if size < _SHORT:
        return False
    for period in range(1, (size + 1) // 3 + 1):
        repeated = period
        while repeated < size and text[size - 1 - repeated] == text[size - 1 - repeated + period]:
            repeated += 1
        # The last turn may have lost the blank that was stripped.
        if repeated >= max(3 * period - 1, size / 2):
            return True
    return False


def _drifts(answer: str, prompt: str) -> bool:
    """Whether most letters are of scripts that the prompt has none of."""
    known = {_script(c) for c in prompt if c.isalpha()}
    scripts = [_script(c) for c in answer if c.isalpha()]
    foreign = sum(script not in known for script in scripts)
    return len(scripts) >= _LETTERS and 2 * foreign > len(scripts)


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "NONE").split(" ", 1)[0]
    return _EAST.get(first, first)
