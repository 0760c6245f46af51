"""Write ``docs/reference``: commands, settings, metrics, files and the Python API, from the code.

``python -m docs.tools.reference`` after changing any of them; a test says when it was forgotten.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command

import moe_serve
from moe_serve.calibration.governance import Declaration
from moe_serve.calibration.store import CalibrationRecord
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.cli.app import app
from moe_serve.cli.commands import COMMANDS, EXAMPLES
from moe_serve.metrics.catalogue import CATALOGUE
from moe_serve.pilot.settings import PilotSettings
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.rollout.policy import Policy
from moe_serve.serving.config import StackConfig

FOLDER: Final = Path(__file__).parents[1] / "reference"
_HEAD: Final = "<!-- Written by `python -m docs.tools.reference`; change the code instead. -->\n\n"


def pages() -> dict[str, str]:
    """File name → content."""
    made = {
        "commands.md": commands(),
        "settings.md": settings(),
        "metrics.md": metrics(),
        "files.md": files(),
        "api.md": api(),
    }
    return {name: _HEAD + text.rstrip() + "\n" for name, text in made.items()}


def commands() -> str:
    """Every command with its options, as its help has them."""
    root: Any = get_command(app)
    parts = [
        "# Commands\n",
        "Exit codes: 0 done, 1 a check failed, 2 unusable input (one line on stderr says what,",
        "where and what to do), 130 interrupted. `--json` prints one object on stdout.\n",
    ]
    for name in COMMANDS:
        command = root.get_command(None, name)
        below = getattr(command, "commands", {})
        parts.append(f"## {name}\n\n{_words(command.help)}\n")
        if not below:
            parts += _command(name, command)
        for path, single in ((f"{name} {n}", c) for n, c in below.items()):
            parts.append(f"### {path}\n\n{_words(single.help)}\n")
            parts += _command(path, single)
    return "\n".join(parts)


def _command(path: str, command: Any) -> Iterator[str]:
    examples = "\n".join(EXAMPLES[path])
    yield f"<!-- not run: tests/cli parses each line -->\n```sh\n{examples}\n```\n"
    rows = []
    for param in command.params:
        names = [*param.opts, *param.secondary_opts]
        shown = ", ".join(f"`{n}`" for n in names) if param.param_type_name == "option" else ""
        default = getattr(param, "default", None)
        told = "required" if param.required else ""
        if not param.required and default not in {None, "", False, PydanticUndefined}:
            told = f"`{_shown(default)}`"
        rows.append((shown or f"`{param.name.upper()}`", told, _words(param.help)))
    yield _table(("argument or option", "default", "meaning"), rows) + "\n"


def settings() -> str:
    """The files that a person writes."""
    parts = ["# Settings\n", "Files in TOML. A key that is not listed is refused, by name.\n"]
    found = (
        ("stack.toml", StackConfig, "`moe-serve up stack.toml`: what is started."),
        ("policy.toml", Policy, "`moe-serve up --policy policy.toml`: how a rollout goes."),
        ("pilot.toml", PilotSettings, "`moe-serve pilot pilot.toml`: what is tried and measured."),
        (
            "calibration.toml",
            Declaration,
            "`moe-serve prune --declaration calibration.toml`: the terms of calibration texts.",
        ),
    )
    return "\n".join([*parts, *_sections(found)])


def _sections(found: Iterable[tuple[str, type, str]]) -> Iterator[str]:
    """A file's name, what it is, and its keys."""
    for title, model, text in found:
        yield f"## {title}\n"
        yield f"{text}\n"
        yield from _model(model)


def files() -> str:
    """The files that a run leaves, key by key."""
    parts = [
        "# Files\n",
        "What a run writes. Everything appears whole or not at all; equal inputs and an equal seed",
        "give equal bytes. The remapping in `config.json` and the layout of tensors are explained",
        "in [how pruning works](../explanation/blocks.md).\n",
    ]
    found = (
        ("moe_serve.json", Manifest, "In a checkpoint: what it was made from, and how."),
        ("plan.json", Plan, "What `apply` carries out."),
        ("evidence.json", Evidence, "In a checkpoint: what its report is made from."),
        (
            "statistics.json",
            CalibrationRecord,
            "Beside `statistics.safetensors` (sums, so that shards add up): what was seen.",
        ),
    )
    return "\n".join([*parts, *_sections(found)])


def metrics() -> str:
    """What the control process and an engine with the plugin export."""
    rows = [
        (f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.help)
        for m in CATALOGUE.values()
    ]
    text = "At `/metrics` of the control port. vLLM's own metrics are scraped as they are."
    head = ("metric", "kind", "labels", "meaning")
    parts = ["# Metrics\n", text + "\n", _table(head, rows)]
    source = Path("patches/moe_serve_vllm/stats.py").read_text(encoding="utf-8")
    family = r'(Gauge|Counter)MetricFamily\(\s+"(\w+)",\s+"([^"]+)",\s+labels=([^\n]+),\n'
    rows = [
        (
            f"`{name}`",
            kind.lower(),
            ", ".join(f"`{label}`" for label in ("variant", "model", *re.findall(r'"(\w+)"', own))),
            text,
        )
        for kind, name, text, own in re.findall(family, source)
    ]
    parts += ["\nAt `/metrics` of an engine that has the plugin:\n", _table(head, rows)]
    return "\n".join(parts)


def api() -> str:
    """What programs import."""
    parts = [
        "# Python API\n",
        "[An example](../python.md) comes first. All names are importable from `moe_serve`.\n",
    ]
    for name in moe_serve.__all__[1:]:
        found = getattr(moe_serve, name)
        parts.append(f"## {name}\n")
        if inspect.isfunction(found):
            parts.append(f"```python\n{_signature(name, found)}\n```\n")
            parts += _docstring(found)
        else:
            parts += _docstring(found)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                parts += _fields(found)
            parts += _members(found)
    return "\n".join(parts)


def _signature(name: str, function: Any) -> str:
    """One parameter a line, with its type."""
    lines, star = [f"{name}("], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            star = True
            lines.append("    *,")
        default = "" if p.default is p.empty else f" = {_shown(p.default)}"
        lines.append(f"    {p.name}: {_type(p.annotation)}{default},")
    return "\n".join([*lines, f") -> {_type(inspect.signature(function).return_annotation)}"])


def _docstring(function: Any) -> Iterator[str]:
    """Google's sections as lists."""
    text = inspect.getdoc(function) or ""
    first, *rest = re.split(r"\n\n?(Args|Raises|Returns|Yields):\n", text)
    yield _words(first) + "\n"
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        yield f"{title}:\n"
        for item in re.split(r"\n(?=\S)", textwrap.dedent(body).strip()):
            name, _, words = item.partition(":")
            yield f"- `{name.strip()}`: {_words(words)}" if words else f"- {_words(item)}"
        yield ""


def _members(kind: type) -> Iterator[str]:
    """Public properties and methods of the class itself."""
    rows = []
    for name, member in vars(kind).items():
        what = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(what):
            continue
        first = (inspect.getdoc(what) or "").split("\n\n")[0]
        rows.append((f"`{name}`" if isinstance(member, property) else f"`{name}()`", _words(first)))
    if rows:
        yield _table(("member", "meaning"), rows) + "\n"


def _fields(kind: type) -> Iterator[str]:
    """A frozen dataclass's."""
    words = attribute_docs(kind)
    rows = []
    for item in dataclasses.fields(kind):
        default = "required"
        if item.default is not dataclasses.MISSING:
            default = f"`{_shown(item.default)}`"
        elif item.default_factory is not dataclasses.MISSING:
            default = f"`{_shown(item.default_factory())}`"
        rows.append((f"`{item.name}`", f"`{_type(item.type)}`", default, words.get(item.name, "")))
    yield _table(("field", "type", "default", "meaning"), rows) + "\n"


def _model(kind: type, prefix: str = "", seen: set[type] | None = None) -> Iterator[str]:
    """A table of a model's keys, then those of the models within it."""
    seen = set() if seen is None else seen
    seen.add(kind)
    if not issubclass(kind, BaseModel):
        yield from _fields(kind)
        return
    words = attribute_docs(kind)
    rows, within = [], []
    for name, field in kind.model_fields.items():
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = f"`{_shown(value)}`" if _shown(value) != "{}" else "as below"
        limits = ", ".join(_limit(m) for m in field.metadata if _limit(m))
        kinds = [m for m in _models(field.annotation) if m not in seen]
        within += [(f"{prefix}{name}", m) for m in kinds]
        type_ = _type(field.annotation) + (f" ({limits})" if limits else "")
        told = words.get(name) or (kinds and _words((kinds[0].__doc__ or "").split("\n\n")[0]))
        rows.append((f"`{name}`", f"`{type_}`", default, told or ""))
    yield _table(("key", "type", "default", "meaning"), rows) + "\n"
    for path, model in within:
        if model in seen:
            continue
        yield f"### {path}: {model.__name__}\n\n{_words(inspect.getdoc(model))}\n"
        yield from _model(model, f"{path}.", seen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Those that an annotation names, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = []
    for part in getattr(annotation, "__args__", ()):
        found += [m for m in _models(part) if m not in found]
    return found


def attribute_docs(kind: type) -> dict[str, str]:
    """Attribute → the docstring under it, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("moe_serve"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)  # noqa: S101 - a class's source is one
        for here, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(here, ast.AnnAssign)
                and isinstance(here.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[here.target.id] = _words(str(after.value.value))
    return found


def _words(text: str | None) -> str:
    """One line, with code and roles as Markdown has them."""
    line = " ".join((text or "").replace("\b", "").split())
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line)
    return line.replace("``", "`")


def _type(annotation: Any) -> str:
    """Short enough to read."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"Annotated\[(\w+), [^\]]*\]+\)*\]?", r"\1", text)
    text = re.sub(r"(?:\b\w+\.)+(?=\w)", "", text)
    return text.replace("NoneType", "None")


def _limit(found: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return next((f"{s} {getattr(found, k)}" for k, s in signs.items() if hasattr(found, k)), "")


def _shown(value: Any) -> str:
    if isinstance(value, Path):
        parts = value.parts
        return "/".join(parts[parts.index("benchmarks") :]) if "benchmarks" in parts else str(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_unset=True)
        return "{" + ", ".join(f"{k} = {_shown(v)}" for k, v in given.items()) + "}"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if dataclasses.is_dataclass(value) or type(value).__module__.startswith("moe_serve"):
        return f"{type(value).__name__}()"
    return str(value) if isinstance(value, str) and value else repr(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").strip() for c in cells) + " |"

    head = tuple(head)
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
