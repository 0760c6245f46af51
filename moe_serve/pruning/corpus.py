"""The texts of a run: read, tokenised, with the terms they come with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.balance import TASK_WEIGHT, for_task, ordered
from moe_serve.calibration.collect import RESERVOIR
from moe_serve.calibration.governance import Declaration, Use
from moe_serve.calibration.passages import Known, passages
from moe_serve.calibration.sequences import Sequences, tokenize
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.store import CalibrationRecord
from moe_serve.calibration.texts import Document, Source, Texts, declared, read_texts, with_task
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import UsageError, require_positive

DEFAULT_TOKENS: Final = 8192
"""Tokens taken from each domain."""


DEFAULT_LENGTH: Final = 2048
"""Tokens per sequence; models with shorter contexts get their own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Which texts, and how much of them."""

    paths: tuple[Path, ...]
    """``.jsonl``, ``.txt``, or folders of them."""
    task_paths: tuple[Path, ...] = ()
    """Texts of one task."""
    task_weight: float | None = None
    """The task's part of the weight of all tokens; ``None``: half."""
    tokens: int = DEFAULT_TOKENS
    """At most, from each domain."""
    length: int = DEFAULT_LENGTH
    """Tokens of a sequence, at most."""
    seed: int = 0
    """Of the choice among more texts than are taken."""
    declaration: Path | None = None
    """``calibration.toml``: the terms that texts come with."""
    purpose: str | None = None
    """What the run is for, as the terms name it."""

    @property
    def given(self) -> bool:
        """Whether there is any text."""
        return bool(self.paths or self.task_paths)

    def to_json(self) -> dict[str, Any]:
        """For the fingerprint of a run."""
        return {"tokens": self.tokens, "length": self.length}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Tokenised texts and where they came from."""

    sequences: Sequences
    sources: tuple[Source, ...]
    passages: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Of each source's documents."""
    purpose: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    """File → documents that were left out of it because a calibration read them."""

    @property
    def balance(self) -> dict[str, float] | None:
        """Each domain's part of the weight; ``None`` where all weigh the same."""
        parts = self.sequences.balance
        return dict(zip(self.sequences.domains, parts, strict=True)) if parts else None

    def weighed(self, balance: Mapping[str, float] | None) -> Corpus:
        """The same texts as a plan weighs them.

        Raises:
            UsageError: the plan weighs other domains, or none apart where there are task texts.
        """
        if balance is None and not self.sequences.balance:
            return self
        parts = ordered(balance or {}, self.sequences.domains)
        return replace(self, sequences=replace(self.sequences, balance=parts))

    def shared(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Files that a record's calibration read too: the name alone where all of one is known.

        Otherwise with how many documents of how many, as in ``heldout.jsonl (3/120)``.
        """
        read = _Read.of(record)
        found = []
        for source, documents in zip(self.sources, self.passages, strict=True):
            count = sum(read.knows(document) for document in documents)
            if source.sha256 in read.files:
                found.append(source.name)
            elif count:
                found.append(f"{source.name} ({count}/{source.documents})")
        return tuple(found)

    def record(self, checkpoint: Checkpoint, seed: int, share: Share = WHOLE) -> CalibrationRecord:
        """What statistics and manifest say about it."""
        found = CalibrationRecord.of(
            checkpoint, self.sequences, self.sources, seed=seed, reservoir=RESERVOIR, share=share
        )
        kept = (
            document
            for source, documents in zip(self.sources, self.passages, strict=True)
            if not source.personal
            for document in documents
        )
        return replace(found, passages=Known.of(kept), purpose=self.purpose)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """What a calibration read, as its record tells."""

    files: frozenset[str]
    known: tuple[Known, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _Read:
        records = [record, record.get("statistics", {})]
        return cls(
            files=frozenset(source["sha256"] for r in records for source in r.get("sources", ())),
            known=tuple(Known.from_json(r["passages"]) for r in records if "passages" in r),
        )

    def knows(self, document: Sequence[int]) -> bool:
        """Whether it overlaps, told from its passages."""
        return any(known.overlaps(document) for known in self.known)


def unread(texts: Texts, record: Mapping[str, Any]) -> tuple[Texts, dict[str, int]]:
    """The documents that a record's calibration did not read; by file, how many it did.

    A file that it read as a whole stays, to be refused.

    Raises:
        UsageError: nothing is left.
    """
    read = _Read.of(record)
    kept: list[Document] = []
    sources: list[Source] = []
    left_out: dict[str, int] = {}
    for source, documents in texts.by_source():
        whole = source.sha256 in read.files
        own = [d for d in documents if whole or not read.knows(passages(d.text))]
        kept += own
        sources.append(replace(source, documents=len(own)))
        if gone := source.documents - len(own):
            left_out[source.name] = left_out.get(source.name, 0) + gone
    if not kept:
        raise UsageError(
            "hold no document that calibration did not use",
            where=", ".join(left_out),
            remedy="measure on other texts",
        )
    return replace(texts, documents=tuple(kept), sources=tuple(sources)), left_out


def refuse_overlap(shared: Sequence[str], what: str) -> None:
    """Refuse to measure on what was calibrated on.

    Raises:
        UsageError: something is shared.
    """
    if shared:
        raise UsageError(
            f"was used {what}, wholly or in some of its documents: figures would be too good",
            where=", ".join(shared),
            remedy="measure on other texts, leave such documents out with --skip-overlap (pilot: "
            "skip_overlap = true), or give --allow-overlap (pilot: allow_overlap = true)",
        )


def needed(corpus: Corpus | None) -> Corpus:
    """The corpus of a run that can't do without.

    Raises:
        UsageError: there is none.
    """
    if corpus is None:
        raise UsageError(
            "give texts to calibrate on",
            where="--calibration",
            remedy="texts like those it will serve: .jsonl, .txt or a folder of them",
        )
    return corpus


def load_corpus(
    checkpoint: Checkpoint, options: TextOptions, skip: Mapping[str, Any] | None = None
) -> Corpus | None:
    """Read and tokenise; ``None`` without texts.

    Documents that a calibration read, as the record ``skip`` tells, are left out.

    Raises:
        UsageError: a bound is not positive, or the task's texts or weight contradict the others.
        CalibrationError: the texts or the tokenizer can't be used, or the texts' terms forbid it.
    """
    if options.task_weight is not None and not options.task_paths:
        raise UsageError(
            "weighs texts that are not given", where="--task-weight", remedy="give --task-texts"
        )
    if not options.given:
        return None
    require_positive({"--tokens": options.tokens, "--sequence-length": options.length})
    longest = checkpoint.family.longest(checkpoint.config)
    texts, left_out = unread(_texts(options), skip) if skip else (_texts(options), {})
    if options.declaration is not None:
        texts = declared(texts, Declaration.load(options.declaration), Use.here(options.purpose))
    sequences = tokenize(
        texts,
        checkpoint.path,
        tokens_per_domain=options.tokens,
        length=min(options.length, longest or options.length),
        vocabulary=checkpoint.shape.vocabulary,
        seed=options.seed,
    )
    if options.task_paths:
        weight = TASK_WEIGHT if options.task_weight is None else options.task_weight
        sequences = replace(sequences, balance=for_task(texts.domains, weight))
    return Corpus(
        sequences=sequences,
        sources=texts.sources,
        passages=tuple(
            tuple(passages(document.text) for document in documents)
            for _, documents in texts.by_source()
        ),
        purpose=options.purpose,
        left_out=left_out,
    )


def _texts(options: TextOptions) -> Texts:
    if not options.task_paths:
        return read_texts(options.paths)
    others = read_texts(options.paths) if options.paths else None
    return with_task(others, read_texts(options.task_paths))
