"""The texts that both variants are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve.errors import UsageError
from moe_serve.rollout.policy import Probes
from moe_serve.rollout.probes import load_probes


def written(path: Path, *texts: str) -> Path:
    """A file of probes, one a line."""
    path.write_text("".join(json.dumps({"text": text, "domain": "d"}) + "\n" for text in texts))
    return path


def test_a_set_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """Whatever the order; the package's own come on top where they are wanted."""
    there = load_probes(Probes(texts=written(tmp_path / "a.jsonl", "x", "y"), default=False))
    back = load_probes(Probes(texts=written(tmp_path / "b.jsonl", "y", "x"), default=False))
    assert there.domains == {"d": 2}
    assert there.digest == back.digest
    both = load_probes(Probes(texts=tmp_path / "a.jsonl"))
    assert len(both.probes) == 2 + len(load_probes(Probes()).probes)
    assert both.digest != there.digest


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("x", "y", "x"), "probe 3 is there twice, or in another file too; remove one"),
        (("x", "y" * 8001), "probe 2 has 8001 characters; cut it to 8000"),
    ],
)
def test_a_probe_that_cannot_be_asked_is_numbered_in_its_file(
    texts: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    """Not among all, the package's included."""
    file = written(tmp_path / "own.jsonl", *texts)
    with pytest.raises(UsageError, match=rf"own\.jsonl: {words}"):
        load_probes(Probes(texts=file, default=True))


def test_too_many_and_none_are_refused(tmp_path: Path) -> None:
    """2,000 at most, one at least."""
    file = written(tmp_path / "own.jsonl", *map(str, range(2001)))
    with pytest.raises(UsageError, match=r"own\.jsonl: 2001 probes; 2000 at most; leave some out"):
        load_probes(Probes(texts=file, default=False))
    with pytest.raises(UsageError, match="there are none; give texts or default = true"):
        load_probes(Probes(default=False))
