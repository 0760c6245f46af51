"""Texts to calibrate or measure on, and a record of what they were."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.balance import TASK
from moe_serve.calibration.governance import Declaration, Declared, Use, refuse
from moe_serve.errors import CalibrationError, UsageError

DEFAULT_DOMAIN: Final = "general"
_HALF: Final = re.compile("[\ud800-\udfff]")
"""A surrogate; json joins those that come in pairs."""
_FIX: Final = 'each line is one JSON object with "text" and optionally "domain" and "licence"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text; the unit that is never split between calibration and evaluation."""

    domain: str
    text: str
    licence: str | None = None

    @property
    def sha256(self) -> str:
        """Identifies the text without revealing it."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a manifest says about one input file. Never the text itself."""

    name: str
    sha256: str
    documents: int
    licences: tuple[str, ...]
    path: Path
    """Where it was read; not stored."""
    declaration: Declared | None = None
    """What its owner says; ``None``: nothing."""

    @property
    def personal(self) -> bool:
        """Whether it is declared to hold personal data."""
        return self.declaration is not None and self.declaration.personal

    def to_json(self) -> dict[str, Any]:
        """As stored in ``statistics.json`` and ``moe_serve.json``."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "documents": self.documents,
            "licences": list(self.licences),
            "declaration": self.declaration.to_json() if self.declaration else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Everything read, in order of path and line."""

    documents: tuple[Document, ...]
    sources: tuple[Source, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in alphabetical order."""
        return tuple(sorted({d.domain for d in self.documents}))

    def by_source(self) -> Iterator[tuple[Source, tuple[Document, ...]]]:
        """Each file and what it holds."""
        start = 0
        for source in self.sources:
            yield source, self.documents[start : start + source.documents]
            start += source.documents


def read_texts(paths: Sequence[Path]) -> Texts:
    """Read ``.jsonl`` and ``.txt`` files, and directories of them.

    A ``.txt`` is one document, its domain the file's name; in a directory the domain of a ``.txt``
    is its sub-folder, and of a ``.jsonl`` row without ``domain`` likewise.

    Raises:
        CalibrationError: a path does not exist, a line is malformed, or there is no text at all.
    """
    documents: list[Document] = []
    sources: list[Source] = []
    for path in paths:
        for file, folder in _files(path):
            found = list(_read_file(file, folder))
            documents += found
            sources.append(
                Source(
                    name=file.name,
                    sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                    documents=len(found),
                    licences=tuple(sorted({d.licence for d in found if d.licence})),
                    path=file,
                )
            )
    if not documents:
        raise CalibrationError(
            "hold no text", where=", ".join(map(str, paths)) or "texts", remedy=_FIX
        )
    return Texts(documents=tuple(documents), sources=tuple(sources))


def declared(texts: Texts, declaration: Declaration, use: Use) -> Texts:
    """The texts with their owners' terms; those that nobody declared stay without.

    Raises:
        CalibrationError: the terms of a source forbid this use.
    """
    sources = tuple(
        replace(source, declaration=declaration.of(source.path, source.sha256))
        for source in texts.sources
    )
    for source in sources:
        if source.declaration is not None:
            refuse(source.path, source.declaration, use)
    return replace(texts, sources=sources)


def with_task(texts: Texts | None, task: Texts) -> Texts:
    """Other texts and those of a task, which form domains of their own.

    Raises:
        UsageError: a document is among both; its weight would be anyone's guess.
    """
    if texts is None:
        texts = Texts(documents=(), sources=())
    known = {document.sha256 for document in texts.documents}
    if twice := sum(document.sha256 in known for document in task.documents):
        raise UsageError(
            f"{twice} of {len(task.documents)} documents are among the calibration texts too",
            where="--task-texts",
            remedy="leave them out of one of the two",
        )
    renamed = tuple(replace(d, domain=TASK + d.domain) for d in task.documents)
    return Texts(documents=texts.documents + renamed, sources=texts.sources + task.sources)


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    if path.is_file():
        yield path, None
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (".jsonl", ".txt") and file.is_file():
                folder = file.parent.relative_to(path).parts
                yield file, folder[0] if folder else None
    else:
        raise CalibrationError(
            "does not exist", where=str(path), remedy="give a .jsonl, a .txt or a folder of them"
        )


def _read_file(file: Path, folder: str | None) -> Iterator[Document]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CalibrationError(
            f"cannot be read as UTF-8 text ({exc})", where=str(file), remedy="re-encode the file"
        ) from exc
    if file.suffix == ".txt":
        if content.strip():
            yield Document(domain=folder or file.stem, text=content)
        return
    if file.suffix != ".jsonl":
        raise CalibrationError("is neither .jsonl nor .txt", where=str(file), remedy=_FIX)
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _parse_line(line, folder, where=f"{file}, line {number}")


def _parse_line(line: str, folder: str | None, *, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise CalibrationError(f"not valid JSON ({exc.msg})", where=where, remedy=_FIX) from exc
    match row:
        case {"text": str(text)} if text.strip():
            domain = row.get("domain", folder or DEFAULT_DOMAIN)
            licence = row.get("licence")
            if isinstance(domain, str) and domain and isinstance(licence, str | None):
                _refuse_half(f"{text}{domain}{licence or ''}", where)
                return Document(domain=domain, text=text, licence=licence)
    raise CalibrationError("has no usable text or domain", where=where, remedy=_FIX)


def _refuse_half(words: str, where: str) -> None:
    """JSON may name half a pair by its escape, which no tokenizer and no file takes."""
    if half := _HALF.search(words):
        raise CalibrationError(
            f"holds half of a character, \\u{ord(half[0]):04x}",
            where=where,
            remedy="leave that out, or write the character whole, as UTF-8",
        )
