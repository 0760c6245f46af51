"""Where points and labels stand in the pilot's drawing."""

from __future__ import annotations

import pytest

from moe_serve.pilot.plot import HEIGHT, WIDTH, Box, labelled, plot, ticks
from tests.pilot.test_decision import ORIGINAL, option


@pytest.mark.parametrize("name", ["block-magnitude-0.75 · recommended · bend", "推奨・屈曲点"])
def test_labels_of_near_points_do_not_meet(name: str) -> None:
    """Five points within 20 units: no label on another or on a point, none cut off."""
    places = [(300.0 + 4 * n, 150.0 - 3 * n) for n in range(5)]
    boxes = []
    for point in labelled(places, [name] * 5):
        width = len(name) * (7.2 if name[0].isascii() else 14.4)
        left = point["label_x"] - (width if point["anchor"] == "end" else 0)
        box = Box(
            left=left, top=point["label_y"] - 11, right=left + width, bottom=point["label_y"] + 3
        )
        assert 0 <= box.left <= box.right <= WIDTH
        assert 0 <= box.top <= box.bottom <= HEIGHT
        boxes.append(box)
    for number, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:number])
        assert not any(box.meets(Box(left=x, top=y, right=x, bottom=y)) for x, y in places)


def test_an_interval_does_not_flatten_the_rest() -> None:
    """One that reaches to 9 nats ends at the drawing's edge; the scale goes to twice the most."""
    wide = option("wide", 500, 0.1, mean_kl_low=0.001, mean_kl_high=9.0)
    found = plot([option("a", 750, 0.05), wide], ORIGINAL, ["a", "wide"], "original")
    top = found["points"][1]["ends"][1]
    assert top == 34.0
    assert found["base"] - found["points"][1]["y"] == pytest.approx(220 / 2.2)
    alone = option("alone", 750, 0.05, mean_kl_low=None, mean_kl_high=None)
    assert plot([alone], ORIGINAL, ["alone"], "original")["points"][0]["ends"] is None


def test_nothing_lost_is_drawn_as_well() -> None:
    """A scale from 0 to 0 would have no end."""
    same = option("same", 750, 0.0)
    found = plot([same], ORIGINAL, ["same"], "original")
    assert found["points"][0]["y"] == found["base"]


def test_ticks_are_round() -> None:
    """Steps of 0.02 up to 0.11, of 0.1 from 0.45 on."""
    assert ticks(0.0, 0.11) == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert ticks(0.45, 1.0) == pytest.approx([0.6, 0.8, 1.0])
