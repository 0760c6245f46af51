"""Terms of calibration texts: what they forbid is refused, and who forgot them is named."""

from __future__ import annotations

import hashlib
from datetime import date
from pathlib import Path

import pytest

from moe_serve.calibration.governance import Declaration, Use, refuse_purpose
from moe_serve.calibration.texts import Texts, declared, read_texts
from moe_serve.errors import CalibrationError, UsageError

TERMS = 'owner = "Legal"\nlicence = "CC0-1.0"\n'
NONE = 'personal_data = "none"\n'
USE = Use(purpose="compression", machine="host1.example.com", today=date(2026, 6, 1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files, one in a folder."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "chats.txt").write_text("Hello, where is my parcel?")
    (tmp_path / "other.txt").write_text("Something else.")
    return tmp_path


def under(root: Path, *sources: str, use: Use = USE) -> Texts:
    """Both files under a declaration."""
    file = root / "calibration.toml"
    file.write_text("".join(f"[[source]]\n{source}\n" for source in sources))
    return declared(read_texts([root / "other.txt", root / "shop"]), Declaration.load(file), use)


def test_terms_are_found_by_path_folder_and_hash(root: Path) -> None:
    """The hash before the path, the longer path before the shorter; others stay undeclared."""
    digest = hashlib.sha256((root / "other.txt").read_bytes()).hexdigest()
    found = under(
        root,
        f'path = "."\n{TERMS}{NONE}'.replace("Legal", "Root"),
        f'path = "shop"\n{TERMS}{NONE}'.replace("Legal", "Shop"),
        f'sha256 = "{digest}"\n{TERMS}{NONE}'.replace("Legal", "Hash"),
    )
    owners = [s.declaration.owner for s in found.sources if s.declaration]
    assert owners == ["Hash", "Shop"]
    only = under(root, f'path = "shop"\n{TERMS}{NONE}')
    assert [s.to_json()["declaration"] is None for s in only.sources] == [True, False]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (NONE + 'machines = ["host2"]', "must not leave host2; this is host1.*run there"),
        (NONE + 'purposes = ["research"]', "for research, not for compression; give --purpose"),
        (NONE + "retain_until = 2026-05-31", "until 2026-05-31, today is 2026-06-01; delete"),
        (NONE + "approval_required = true", "not approved, and it requires it; have Legal"),
        ('personal_data = "present"', "not approved, and it holds personal data"),
        (
            NONE + 'approval = { by = "A", on = 2026-06-02 }',
            "is approved from 2026-06-02, today is 2026-06-01",
        ),
        (NONE + f'sha256 = "{"0" * 64}"', "declared is 000.*restore the declared file"),
    ],
)
def test_what_terms_forbid_is_refused(root: Path, terms: str, words: str) -> None:
    """Naming the file, the reason and the way out."""
    with pytest.raises(CalibrationError, match=f"chats.txt: .*{words}"):
        under(root, f'path = "shop"\n{TERMS}{terms}')


def test_terms_that_are_met_let_texts_through(root: Path) -> None:
    """This machine by its short name, the last day of retention, an approval of today."""
    found = under(
        root,
        f'path = "shop"\n{TERMS}personal_data = "present"\nmachines = ["HOST1"]\n'
        'purposes = ["research", "compression"]\nretain_until = 2026-06-01\n'
        'approval = { by = "A", on = 2026-06-01 }',
    )
    assert found.sources[1].personal
    stored = found.sources[1].to_json()["declaration"]
    assert stored["approval"] == {"by": "A", "on": "2026-06-01"}
    assert stored["bound_to_machine"]
    assert "HOST1" not in str(stored)


def test_a_purpose_must_be_named_where_terms_list_some(root: Path) -> None:
    """Nobody's purpose is guessed."""
    with pytest.raises(CalibrationError, match="and none was named"):
        under(root, f'path = "shop"\n{TERMS}{NONE}purposes = ["a"]', use=Use(machine="host1"))
    record = [{"name": "chats.txt", "declaration": {"purposes": ["a"]}}]
    refuse_purpose(record, "a", root)
    with pytest.raises(CalibrationError, match=r"gathered on chats\.txt.*not for b"):
        refuse_purpose(record, "b", root)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TERMS + NONE, "by path, sha256 or both"),
        (f'path = "shop"\n{TERMS}', "personal_data"),
        (f'path = "shop"\n{TERMS}{NONE}colour = 1', "colour"),
        (f'path = "shop"\n{NONE}licence = "x"\nowner = "two\\nlines"', "owner"),
        ("path =", "cannot be read"),
    ],
)
def test_a_wrong_declaration_is_refused(root: Path, source: str, words: str) -> None:
    """By field, before any text is used."""
    with pytest.raises(UsageError, match=words):
        under(root, source)
