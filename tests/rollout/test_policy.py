"""The policy file."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.errors import UsageError
from moe_serve.rollout import margins, policy
from moe_serve.rollout.policy import Policy, Sticky, load_policy
from moe_serve.rollout.table import Table
from moe_serve.serving.keys import KEY_HEADER


def written(tmp_path: Path, text: str) -> Path:
    """As a file."""
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    """Everything has a default; four steps of five guards and three tests of probes: 23."""
    policy = load_policy(written(tmp_path, ""))
    assert policy == Policy()
    assert [step.weight for step in policy.steps] == [0, 1, 5, 25, 50]
    assert policy.tests == 4 * 5 + 3


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("", ("header:x-user-id", "cookie:moe-serve-user")),
        (
            'sticky = {header = "x-chat", key = true, cookie = ""}',
            ("header:x-chat", f"header:{KEY_HEADER}"),
        ),
        ('sticky = "off"', ()),
    ],
)
def test_users_stay_unless_told_otherwise(text: str, ways: tuple[str, ...], tmp_path: Path) -> None:
    """In the order in which they are looked at."""
    sticky = load_policy(written(tmp_path, text)).sticky
    assert (sticky.ways if isinstance(sticky, Sticky) else ()) == ways


def test_files_are_found_from_the_policys_folder(tmp_path: Path) -> None:
    """Whatever folder the program runs in; an absolute path stays."""
    text = '[probes]\ntexts = "mine.jsonl"\n[hooks]\nsecret = "/etc/key"\n'
    policy = load_policy(written(tmp_path, text))
    assert policy.probes.texts == tmp_path / "mine.jsonl"
    assert policy.hooks.secret == Path("/etc/key")


def test_parts_are_read(tmp_path: Path) -> None:
    """Steps with gates, a guard left out, freeze windows with times."""
    policy = load_policy(
        written(
            tmp_path,
            """
            timezone = "Europe/Berlin"
            [[steps]]
            weight = 0
            shadow = 10
            [[steps]]
            weight = 20
            gate = "hand"
            [guards]
            ttft = "off"
            [guards.errors]
            margin = 0.01
            [[freeze]]
            days = ["fri"]
            start = "16:00:00"
            """,
        )
    )
    assert policy.steps[1].gate == "hand"
    assert list(policy.guards.latency()) == ["tpot"]
    assert policy.guards.errors.margin == 0.01
    # 2027-01-15 was a Friday; Berlin is an hour ahead of UTC then: 15:30 is 16:30 there.
    assert policy.frozen(1_800_026_600.0 + 600)
    assert not policy.frozen(1_800_026_600.0 - 7200)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = []", "steps"),
        ("guards.quality = 'off'\nguards.garbage = 'off'", "without traffic needs the guards"),
        ("[[steps]]\nweight = 5\nshadow = 5", "a weight or a shadow share, not both"),
        ("[[steps]]\nweight = 5\n[[steps]]\nweight = 5", "weights that rise"),
        (
            "[[steps]]\nweight = 5\n[[steps]]\nweight = 0\nshadow = 1",
            "without weight come first",
        ),
        ("alhpa = 0.1", "alhpa"),
        ("alpha = 1.5", "alpha"),
        ("timezone = 'Mars/Olympus'", "no time zone 'Mars/Olympus'"),
        ("strata = [8, 2]", "strata must rise"),
        ("[guards.errors]\nmargin = 'none'", "guards.errors.margin"),
        ("alpha = ", "cannot be read"),
    ],
)
def test_mistakes_are_named(text: str, says: str, tmp_path: Path) -> None:
    """Flagger #1581: an unknown name must not pass in silence."""
    with pytest.raises(UsageError, match=r"policy\.toml") as caught:
        load_policy(written(tmp_path, text))
    assert says in str(caught.value)


def test_every_field_is_explained() -> None:
    """A field without a sentence after it is refused here; a part explains itself."""
    found = [*vars(policy).values(), *vars(margins).values()]
    parts = [part for part in found if isinstance(part, type) and issubclass(part, Table)]
    assert {Policy, margins.ErrorGuard} <= {*parts}
    silent = {
        f"{part.__name__}.{name}"
        for part in parts
        for name, field in part.model_fields.items()
        if not field.description and not isinstance(field.default, Table)
    }
    assert silent == set()
