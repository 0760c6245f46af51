"""Answers that no one wants, in several languages, and answers that only look like them."""

from __future__ import annotations

import pytest

from moe_serve.serving.garbage import Flaw, flaw, loops

PROMPT = "Soil is more than ground-up rock; it holds"


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        (" water, air, roots, fungi and the remains of earlier plants.", PROMPT, ""),
        ("", PROMPT, "empty"),
        (" \n\t ", PROMPT, "empty"),
        (" the the the the the the the the the", PROMPT, "loop"),
        (" water that came and went, and went, and went, and went,", PROMPT, "loop"),
        ("それは" * 9, "駅前の喫茶店は朝に開く。", "loop"),
        ("店主は豆を挽きながら常連の顔を思い浮かべ、傘立てを出しておく。", "駅前の喫茶店。", ""),
        (" воды и воздуха, корней и грибов бывает много", PROMPT, "script"),
        ("wa\ufffdter\ufffdan", PROMPT, "broken"),
        ("das ist ein Satz, der mitten im Zeichen endet\ufffd", PROMPT, ""),
    ],
)  # fmt: skip
def test_flaws(answer: str, prompt: str, expected: Flaw) -> None:
    """Each kind is told from the text alone, and good text is left alone."""
    assert flaw(answer, prompt) == expected


def test_a_loop_needs_three_turns_over_half_of_the_text() -> None:
    """Two turns are a figure of speech; three at the end of a long text are a refrain."""
    part = "one fine day in May "
    assert not loops(part * 2)
    assert loops(part * 3)
    assert not loops("Every word of this long beginning is another than the next one. " + "la " * 9)
