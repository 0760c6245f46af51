"""Shared passages, found from hashes alone."""

from __future__ import annotations

import random

import pytest

from benchmarks.fixtures import CALIBRATION, HELDOUT
from moe_serve.calibration import passages as module
from moe_serve.calibration.passages import LETTERS, Known, passages
from moe_serve.calibration.texts import read_texts


def words(seed: int, count: int = 300) -> str:
    """Random words of five letters."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(count))


def test_a_copy_is_found_whatever_its_spaces_and_capitals() -> None:
    """Also inside another document, and cut to a part; a stranger is not."""
    text = words(1)
    known = Known.of([passages(text)])
    assert known.overlaps(passages(text.upper().replace(" ", "\n - ")))
    assert known.overlaps(passages(text[400:1200]))
    assert Known.of([passages(words(2) + " " + text + words(3))]).overlaps(passages(text))
    assert not known.overlaps(passages(words(4)))


def test_a_shared_header_is_no_overlap() -> None:
    """As much of a document as its own text: 300 words of 600; and 50 of 90, a short one."""
    for size, rest in ((300, 300), (50, 40)):
        header = words(5, size)
        known = Known.of([passages(f"{header} {words(6, rest)}")])
        assert any(h in known.hashes for h in passages(header + words(7, rest)))
        assert not known.overlaps(passages(f"{header} {words(7, rest)}"))


def test_short_documents_leave_nothing() -> None:
    """They could be guessed; one letter more than the bound's predecessor counts."""
    assert passages("a" * (LETTERS - 1) + " !?") == ()
    assert len(passages("a" * LETTERS)) == 1


def test_a_full_record_leaves_out_the_same_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a quarter, copies are judged by the passages that there was room for."""
    documents = [passages(words(seed)) for seed in range(20)]
    monkeypatch.setattr(module, "BOUND", len({h for d in documents for h in d}) // 4)
    known = Known.of(documents)
    assert known == Known.from_json(known.to_json())
    judged = [d for d in documents if known.judges(d)]
    assert len(judged) >= 5
    assert all(known.overlaps(d) for d in judged)
    assert not any(known.overlaps(passages(words(seed))) for seed in range(100, 120))


def test_the_fixture_keeps_its_promise() -> None:
    """Of its held-out documents none is in its calibration texts, as its README says."""
    used, held = (read_texts([path]).documents for path in (CALIBRATION, HELDOUT))
    known = Known.of(passages(document.text) for document in used)
    judged = [found for document in held if known.judges(found := passages(document.text))]
    assert len(judged) > 0.9 * len(held)
    assert not any(map(known.overlaps, judged))
