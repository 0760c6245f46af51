"""Makes the pack: ``python -m benchmarks.tasks.build``; the same bytes every time.

From ``benchmarks/fixtures/heldout.jsonl`` alone, which the fixture was neither trained nor
calibrated on. Every item is a context and four continuations that are about as long as each
other, all from the same document, so that neither length nor vocabulary gives the answer away.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
TEXTS: Final = HERE.parent / "fixtures" / "heldout.jsonl"
ITEMS: Final = 120
"""Of each task, at most: about 4 points of standard error on a difference."""
_CHOICES: Final = 4
_NEAR: Final = 12
"""Continuations of the nearest lengths that the wrong ones are drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question."""

    domain: str
    context: str
    choices: tuple[str, ...]
    answer: int
    licence: str


def _sentences(text: str) -> list[str]:
    """Sentences of 40 to 400 characters on one line each, in order."""
    plain = re.sub(r"\s+", " ", text)
    found = re.findall(r"(?<=[.。] )[A-ZÄÖÜÀÉ][^.。]+\.(?= )|(?<=。)\s?[^.。]+。", plain)
    return [s.strip() for s in found if 40 <= len(s.strip()) <= 400 or "。" in s]


def cloze(text: str) -> list[tuple[str, str]]:
    """A sentence without its last word, and that word."""
    found = (re.fullmatch(r"(.{30,}) (\w{4,})\.", s) for s in _sentences(text))
    return [(m[1], f" {m[2]}") for m in found if m]


def glosses(text: str) -> list[tuple[str, str]]:
    """A word of the dictionary, and what it means without its examples."""
    found = (re.fullmatch(r"([^:]{2,60}): ([^;]{15,120})(;.*)?", s) for s in text.splitlines())
    return [(f"{m[1]}:", f" {m[2]}") for m in found if m]


def code(text: str) -> list[tuple[str, str]]:
    """Eight lines, and the one that follows."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    pairs = ((lines[i - 8 : i], lines[i]) for i in range(8, len(lines)))
    return [
        ("\n".join(before), f"\n{after}")
        for before, after in pairs
        if len(after.strip()) >= 12 and after not in before
    ]


def following(text: str) -> list[tuple[str, str]]:
    """A sentence, and the one that follows it in the text."""
    plain = re.sub(r"\s+", " ", text)
    return [
        (one, other if "。" in one else f" {other}")
        for one, other in pairwise(_sentences(text))
        if f"{one} {other}" in plain or f"{one}{other}" in plain
    ]


TASKS: Final[dict[str, tuple[tuple[str, ...], Callable[[str], list[tuple[str, str]]]]]] = {
    "cloze": (("database-docs", "french", "german"), cloze),
    "glosses": (("dictionary",), glosses),
    "code": (("python", "c"), code),
    "following": (("japanese", "german", "french", "database-docs"), following),
}
"""Name → domains, and what makes pairs of context and continuation of a document."""


def _items(
    documents: Sequence[dict[str, Any]], make: Callable[[str], list[tuple[str, str]]]
) -> Iterator[Item]:
    lots = random.Random(0)
    for document in documents:
        pairs = make(document["text"])
        endings = sorted({ending for _, ending in pairs}, key=lambda e: (len(e), e))
        if len(endings) < 2 * _NEAR:
            continue
        for context, right in pairs:
            # What the context holds would be told by its repetition.
            other = [e for e in endings if e != right and e.strip() not in context]
            near = sorted(other, key=lambda e: (abs(len(e) - len(right)), e))[:_NEAR]
            yield Item(
                domain=document["domain"],
                context=context,
                choices=(right, *lots.sample(near, _CHOICES - 1)),
                answer=0,
                licence=document["licence"],
            )


def _placed(item: Item, place: int) -> Item:
    """With the right one at ``place``; it is as often at each, so that a place says nothing."""
    right, *wrong = item.choices
    return replace(item, choices=(*wrong[:place], right, *wrong[place:]), answer=place)


def build(name: str) -> str:
    """One task's file: items spread evenly over its domains and their documents."""
    domains, make = TASKS[name]
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    kept: list[Item] = []
    for domain in domains:
        every = list(_items([row for row in rows if row["domain"] == domain], make))
        count = min(len(every), ITEMS // len(domains))
        numbers = sorted(random.Random(1).sample(range(len(every)), count))
        kept += [_placed(every[number], n % _CHOICES) for n, number in enumerate(numbers)]
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in kept)


def main() -> None:
    """Write all files."""
    for name in TASKS:
        (HERE / f"{name}.jsonl").write_text(build(name), encoding="utf-8")


if __name__ == "__main__":
    main()
