"""Texts as people have them: what can't be read is named, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.calibration.sequences import pack
from moe_serve.calibration.texts import Document, Texts, read_texts
from moe_serve.errors import CalibrationError


def test_domains_come_from_rows_files_and_folders(tmp_path: Path) -> None:
    """A row's own word first, then the folder's name, then the file's; blank texts are none."""
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.jsonl").write_text(
        '{"text": "x"}\n\n{"text": "y", "domain": "tax", "licence": "CC0-1.0"}\n'
    )
    (tmp_path / "law" / "b.txt").write_text("z")
    (tmp_path / "law" / "notes.md").write_text("not a text")
    (tmp_path / "poems.txt").write_text("w")
    (tmp_path / "empty.txt").write_text(" \n")
    found = read_texts([tmp_path])
    assert [(d.domain, d.text) for d in found.documents] == [
        ("law", "x"),
        ("tax", "y"),
        ("law", "z"),
        ("poems", "w"),
    ]
    counted = {source.name: source.documents for source in found.sources}
    assert counted == {"a.jsonl": 2, "b.txt": 1, "empty.txt": 0, "poems.txt": 1}
    licences = {source.name: source.licences for source in found.sources if source.licences}
    assert licences == {"a.jsonl": ("CC0-1.0",)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\n", r"a\.csv: is neither \.jsonl nor \.txt"),
        ("a.txt", b"caf\xe9", r"a\.txt: cannot be read as UTF-8 text .*; re-encode the file"),
        ("a.txt", b"  \n", r"a\.txt: hold no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'\n\n{"txt": "x"}', r"a\.jsonl, line 3: has no usable text or domain"),
        ("a.jsonl", b'{"text": " "}', r"line 1: has no usable text"),
        ("a.jsonl", b'{"text": "x", "domain": 3}', r"line 1: has no usable text or domain"),
        ("a.jsonl", b'{"text": "x", "licence": []}', r"line 1: has no usable text or domain"),
        ("a.jsonl", b'["x"]', r"line 1: has no usable text"),
        (
            "a.jsonl",
            b'{"text": "\\ud83d\\ude00"}\n{"text": "so \\ud83d"}',
            r"a\.jsonl, line 2: holds half of a character, \\ud83d; leave that out",
        ),
        ("a.jsonl", b'{"text": "x", "domain": "\\udE00"}', r"line 1: holds half of a character"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    """With the line, where a file has lines."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        read_texts([tmp_path / name])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Also a folder without any."""
    with pytest.raises(CalibrationError, match=r"none: does not exist; give a \.jsonl"):
        read_texts([tmp_path / "none"])
    with pytest.raises(CalibrationError, match="hold no text"):
        read_texts([tmp_path])


def test_a_domain_of_hardly_a_token_is_refused() -> None:
    """One letter and the end of the text are two tokens."""
    texts = Texts(documents=(Document(domain="tiny", text="x"),), sources=())
    with pytest.raises(CalibrationError, match="domain 'tiny' has only 2 tokens; give it at least"):
        pack(texts, lambda text: [ord(c) for c in text], 0, 100, 16, 0)
