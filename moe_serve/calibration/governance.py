"""``calibration.toml``: what the owners of calibration texts declare, and what that forbids."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_serve.errors import CalibrationError
from moe_serve.files import read_toml, validating

OPTION: Final = "--declaration"
Word = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
"""One line: it goes into the model card."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Approval(_Part):
    """Who allowed the use, and when."""

    by: Word
    """A person or office."""
    on: date
    """From this day on."""


class Declared(_Part):
    """One ``[[source]]``: a file, a folder or a hash, and the terms it comes with."""

    path: Path | None = None
    """A file or folder, relative to the declaration; all in a folder share its terms."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """The file's; with ``path``, it must not have changed since."""
    owner: Word
    """Who answers for the texts."""
    licence: Word
    """As its holder names it."""
    purposes: tuple[Word, ...] = ()
    """What it may be used for; empty: anything."""
    personal_data: Literal["none", "pseudonymised", "present"]
    """Unless ``none``, an approval is needed."""
    retain_until: date | None = None
    """The last day on which it may be used; ``None``: no end."""
    machines: tuple[Word, ...] = ()
    """Hosts it must not leave; empty: any."""
    approval_required: bool = False
    """Texts with personal data always need one."""
    approval: Approval | None = None
    """Who allowed it."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.path is None and self.sha256 is None:
            raise ValueError("name the source by path, sha256 or both")
        return self

    @property
    def personal(self) -> bool:
        """Whether people can be told from it."""
        return self.personal_data != "none"

    def to_json(self) -> dict[str, Any]:
        """For the record: the terms, without paths and names of machines."""
        terms = self.model_dump(mode="json", exclude={"path", "sha256", "machines"})
        return terms | {"bound_to_machine": bool(self.machines)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What is about to happen to texts."""

    purpose: str | None = None
    machine: str = ""
    today: date = date.max

    @classmethod
    def here(cls, purpose: str | None) -> Use:
        """On this machine, today (UTC)."""
        return cls(purpose=purpose, machine=platform.node(), today=datetime.now(UTC).date())


class Declaration(_Part):
    """The whole file."""

    source: tuple[Declared, ...]
    """One ``[[source]]`` for each file, folder or hash."""

    @classmethod
    def load(cls, path: Path) -> Declaration:
        """Read it.

        Raises:
            UsageError: unreadable, or naming every field that is wrong.
        """
        remedy = "each [[source]] needs path or sha256, owner, licence and personal_data"
        values = read_toml(path, remedy)
        with validating(str(path), remedy):
            found = cls.model_validate(values)
        base = path.absolute().parent
        placed = tuple(
            s.model_copy(update={"path": (base / s.path).resolve()}) if s.path else s
            for s in found.source
        )
        return cls(source=placed)

    def of(self, file: Path, sha256: str) -> Declared | None:
        """The terms of a file: by its hash, else by the longest path that leads to it.

        Raises:
            CalibrationError: its content is not what was declared under this path.
        """
        for declared in self.source:
            if declared.sha256 == sha256:
                return declared
        place = file.resolve()
        leading = [
            s for s in self.source if s.path and (s.path == place or s.path in place.parents)
        ]
        if not leading:
            return None
        found = max(leading, key=lambda s: len(s.path.parts) if s.path else 0)
        if found.sha256 is not None:
            raise CalibrationError(
                f"has SHA-256 {sha256}, declared is {found.sha256}",
                where=str(file),
                remedy=f"restore the declared file, or have the new one approved and change "
                f"{OPTION}",
            )
        return found


def refuse(file: Path, declared: Declared, use: Use) -> None:
    """Hold a use against a source's terms.

    Raises:
        CalibrationError: the machine, the purpose or the day is not allowed, or an approval is
            missing.
    """
    problem = (
        _machine(declared, use)
        or _purpose(declared, use)
        or _retention(declared, use)
        or _approval(declared, use)
    )
    if problem is not None:
        what, remedy = problem
        raise CalibrationError(what, where=str(file), remedy=remedy)


def _machine(declared: Declared, use: Use) -> tuple[str, str] | None:
    hosts = {use.machine.casefold(), use.machine.casefold().partition(".")[0]}
    if not declared.machines or hosts & {name.casefold() for name in declared.machines}:
        return None
    return (
        f"must not leave {', '.join(declared.machines)}; this is {use.machine}",
        f"run there and delete this copy, or ask {declared.owner}",
    )


def _purpose(declared: Declared, use: Use) -> tuple[str, str] | None:
    if not declared.purposes or use.purpose in declared.purposes:
        return None
    allowed = ", ".join(declared.purposes)
    asked = f"not for {use.purpose}" if use.purpose else "and none was named"
    return (
        f"may be used for {allowed}, {asked}",
        f"give --purpose {declared.purposes[0]} if that is yours, or leave this source out",
    )


def _retention(declared: Declared, use: Use) -> tuple[str, str] | None:
    if declared.retain_until is None or use.today <= declared.retain_until:
        return None
    return (
        f"was to be kept until {declared.retain_until}, today is {use.today}",
        f"delete it and use other texts, or ask {declared.owner} to extend retain_until",
    )


def _approval(declared: Declared, use: Use) -> tuple[str, str] | None:
    if declared.approval is not None:
        if declared.approval.on <= use.today:
            return None
        return (
            f"is approved from {declared.approval.on}, today is {use.today}",
            "wait, or correct approval.on",
        )
    if not (declared.approval_required or declared.personal):
        return None
    why = "holds personal data" if declared.personal else "requires it"
    return (
        f"is not approved, and it {why}",
        f"have {declared.owner} approve it and write approval = {{ by = …, on = … }} in {OPTION}",
    )


def refuse_purpose(sources: Sequence[dict[str, Any]], purpose: str, where: Path) -> None:
    """Hold the purpose of a run against the terms that statistics were gathered under.

    Raises:
        CalibrationError: a source of theirs may not be used for it.
    """
    for source in sources:
        allowed = (source.get("declaration") or {}).get("purposes")
        if allowed and purpose not in allowed:
            raise CalibrationError(
                f"were gathered on {source['name']}, which may be used for {', '.join(allowed)}, "
                f"not for {purpose}",
                where=str(where),
                remedy="calibrate without that source",
            )


def undeclared(sources: Sequence[dict[str, Any]]) -> list[str]:
    """Names of a record's sources whose owner declared nothing."""
    return [source["name"] for source in sources if not source.get("declaration")]
