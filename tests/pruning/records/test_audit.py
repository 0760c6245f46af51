"""Records of texts from calibration to audit: on whose terms, unchanged, and without a word."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_serve.checkpoint.chain import chained
from moe_serve.checkpoint.manifest import MANIFEST, Manifest
from moe_serve.cli.app import app
from moe_serve.errors import CalibrationError, UsageError
from moe_serve.evaluation.comparison import compare
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.records.audit import audit
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import PruneResult, prune
from moe_serve.pruning.selection import Selection
from tests.support.computed import Computed
from tests.support.models import make_model, write_texts

TERMS = """
[[source]]
path = "texts.jsonl"
owner = "Legal department"
licence = "CC0-1.0"
purposes = ["compression"]
personal_data = "{personal}"
retain_until = 2999-12-31
machines = []
approval = {{ by = "D. P. Officer", on = 2020-01-01 }}
"""


def run(root: Path, name: str, statistics: Path | None = None, **texts: object) -> PruneResult:
    """A quick run on at most 256 tokens of a domain."""
    given = {"paths": (root / "texts.jsonl",), "tokens": 256, "length": 64} | texts
    return prune(
        PruneRequest(
            model=root / "m",
            output=root / name,
            texts=TextOptions(**given),  # type: ignore[arg-type]
            selection=Selection(keep=0.5, method="drop-frequency"),
            batch_tokens=256,
            statistics=statistics,
        ),
        Silent(),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``declared`` with its statistics, ``undeclared``, and ``reused``: from statistics alone."""
    root = tmp_path_factory.mktemp("audit")
    make_model(root / "m", "qwen3_moe")
    write_texts(root / "texts.jsonl")
    for personal in ("none", "present"):
        (root / f"{personal}.toml").write_text(TERMS.format(personal=personal))
    use, terms = "compression", root / "none.toml"
    run(root, "declared", root / "statistics", declaration=terms, purpose=use)
    run(root, "undeclared")
    run(root, "reused", root / "statistics", paths=())
    run(root, "personal", declaration=root / "present.toml", purpose=use)
    return root


def test_a_declared_checkpoint_passes(root: Path) -> None:
    """With everything at hand, all is recomputed; the record names owner and approval."""
    found = audit(root / "declared", Silent(), original=root / "m", texts=[root / "texts.jsonl"])
    assert found.problems == ()
    assert len(found.checked) == 6
    (source,) = found.to_json()["sources"]
    assert source["declaration"]["owner"] == "Legal department"
    assert found.to_json()["purpose"] == "compression"
    assert "owner Legal department" in (root / "declared" / "README.md").read_text()
    assert audit(root / "reused", Silent()).sources == [source]


def test_undeclared_texts_are_marked(root: Path) -> None:
    """In the card and by the audit."""
    assert "**undeclared**" in (root / "undeclared" / "README.md").read_text()
    assert audit(root / "undeclared", Silent()).problems == (
        "texts.jsonl: nobody declared its terms",
    )


def test_whatever_changed_is_named(root: Path, tmp_path: Path) -> None:
    """A weight file, the plan, the texts, the original, the day."""
    folder = tmp_path / "changed"
    shutil.copytree(root / "declared", folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"seed": 7, "statistics_sha256": "0"}))
    (folder / "evidence.json").unlink()
    (folder / "extra.txt").write_text("")
    (tmp_path / "texts.jsonl").write_text('{"text": "others"}')
    original = tmp_path / "m"
    shutil.copytree(root / "m", original)
    (original / "config.json").write_text((original / "config.json").read_text() + " ")
    found = audit(
        folder,
        Silent(),
        original=original,
        texts=[tmp_path / "texts.jsonl"],
        today=date(3000, 1, 1),
    )
    assert found.problems == (
        "evidence.json is missing",
        "plan.json differs from its SHA-256 in moe_serve.json",
        "extra.txt is not in moe_serve.json",
        "plan.json is not the plan in moe_serve.json",
        "plan.json was made from other statistics than moe_serve.json says",
        "texts.jsonl: was to be kept until 2999-12-31; see that it is deleted",
        "original: config.json differs from its SHA-256 in moe_serve.json",
        "text texts.jsonl differs from its SHA-256 in moe_serve.json",
    )


def test_an_edit_of_the_record_is_found(root: Path, tmp_path: Path) -> None:
    """An owner rewritten, a field added, the chain taken away: where it breaks is told.

    Who makes the chain anew is not found out but by the seal, which is another one then.
    """
    folder = tmp_path / "edited"
    shutil.copytree(root / "declared", folder)
    file = folder / MANIFEST
    written = json.loads(file.read_text())
    before = audit(folder, Silent())
    assert before.seal == written["chain"]["statistics_sha256"], "the last field by name"
    edited = json.loads(file.read_text().replace("Legal department", "Somebody else"))
    for content, words in (
        (edited, "was edited: its chain of hashes breaks at calibration"),
        (written | {"seed": 7}, "breaks at seed"),
        (written | {"chain": {}}, "holds no chain of hashes"),
    ):
        file.write_text(json.dumps(content))
        (problem,) = audit(folder, Silent()).problems
        assert words in problem
        assert problem in verify(folder).problems
    file.write_text(json.dumps(chained(edited)))
    again = audit(folder, Silent())
    assert (again.problems, again.seal != before.seal) == ((), True)


def test_statistics_are_audited_too(root: Path, tmp_path: Path) -> None:
    """Their record, their tensors, the texts, and the model that was observed."""
    texts = [root / "texts.jsonl"]
    found = audit(root / "statistics", Silent(), original=root / "m", texts=texts)
    assert (found.problems, len(found.checked), found.kind) == ((), 5, "statistics")
    assert found.sources[0]["declaration"]["owner"] == "Legal department"
    folder = tmp_path / "statistics"
    shutil.copytree(root / "statistics", folder)
    record = json.loads((folder / "statistics.json").read_text())
    record["sources"][0]["declaration"]["owner"] = "Somebody else"
    (folder / "statistics.json").write_text(json.dumps(record))
    tensors = bytearray((folder / "statistics.safetensors").read_bytes())
    tensors[-1] ^= 1
    (folder / "statistics.safetensors").write_bytes(tensors)
    other = make_model(tmp_path / "m", "qwen3_moe", experts=16)
    assert audit(folder, Silent(), original=other, today=date(3000, 1, 1)).problems == (
        "statistics.json was edited: its chain of hashes breaks at sources",
        "statistics.safetensors differs from its SHA-256",
        "texts.jsonl: was to be kept until 2999-12-31; see that it is deleted",
        "original: its configuration and tensors are other ones than those observed",
    )


def test_the_command_exits_1_where_something_is_wrong(root: Path) -> None:
    """0 where nothing is; ``--json`` is one object either way."""
    for name, code in (("declared", 0), ("undeclared", 1), ("statistics", 0)):
        done = CliRunner().invoke(app, ["audit", str(root / name), "--json"])
        assert done.exit_code == code
        assert json.loads(done.stdout)["passed"] is (code == 0)
        shown = CliRunner().invoke(app, ["audit", str(root / name)])
        assert ("PROBLEM" in shown.stdout) is (code == 1)


def test_terms_hold_for_a_run_and_for_its_statistics(root: Path) -> None:
    """Another purpose is refused from the texts and from what was gathered on them."""
    words = "for compression, not for resale"
    with pytest.raises(CalibrationError, match=words):
        run(root, "refused", declaration=root / "none.toml", purpose="resale")
    assert not (root / "refused").exists()
    with pytest.raises(CalibrationError, match=words):
        run(root, "refused", root / "statistics", paths=(), purpose="resale")
    assert not (root / "refused").exists()


@pytest.mark.parametrize("command", ["calibrate", "prune", "apply"])
def test_commands_that_read_texts_take_terms(root: Path, tmp_path: Path, command: str) -> None:
    """``--declaration`` and ``--purpose`` reach the texts of each."""
    plan = [str(root / "declared" / "plan.json")] if command == "apply" else []
    keep = ["--keep", "0.5"] if command == "prune" else []
    terms = ["--declaration", str(root / "none.toml"), "--purpose", "resale"]
    texts = ["--calibration", str(root / "texts.jsonl"), *terms]
    arguments = [command, str(root / "m"), *plan, str(tmp_path / "out"), *keep, *texts]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, CalibrationError)
    assert "not for resale" in str(done.exception)


def test_compare_takes_texts_that_overlap_when_told_to(root: Path) -> None:
    """The very file that was calibrated on, by name; with the flag a warning is left."""
    places = [str(root / "m"), str(root / "undeclared"), "--texts", str(root / "texts.jsonl")]
    sizes = ["--tokens", "64", "--sequence-length", "64", "--device", "cpu"]
    arguments = ["compare", *places, *sizes]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UsageError)
    assert "--allow-overlap" in str(refused.exception)
    allowed = CliRunner().invoke(app, [*arguments, "--allow-overlap", "--json"])
    assert allowed.exit_code == 0
    assert '"overlap": ["texts.jsonl"]' in allowed.stdout.replace("\n", "").replace("  ", "")


def test_no_word_of_a_text_is_stored(root: Path) -> None:
    """No run of 12 letters of any document in any file of statistics and checkpoints.

    The texts' letters are eleven; of 12 random ones, a tokenizer's file holds none by chance.
    """
    rows = [json.loads(line) for line in (root / "texts.jsonl").read_text().splitlines()]
    pieces = [text[i : i + 12] for text in (r["text"] for r in rows) for i in range(0, 388, 12)]
    folders = ("statistics", "declared", "undeclared", "reused")
    files = [f for name in folders for f in (root / name).rglob("*") if f.is_file()]
    assert len(files) > 20
    contents = [file.read_bytes() for file in files]
    assert not [p for p in pieces for content in contents if p.encode() in content]


def test_documents_that_were_calibrated_on_are_refused(root: Path, tmp_path: Path) -> None:
    """One of two, planted in another file with other spaces; ``allow_overlap`` measures it."""
    planted = json.loads((root / "texts.jsonl").read_text().splitlines()[0])["text"]
    fresh = json.loads(write_texts(tmp_path / "new", seed=1).read_text().splitlines()[0])["text"]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({"text": t}) for t in (fresh, planted.replace(" ", "\n"))))
    options = TextOptions(paths=(held,), tokens=64, length=64)

    def measured(name: str, *, allowed: bool = False) -> tuple[str, ...]:
        cpu = torch.device("cpu")
        return compare(
            root / "m", root / name, options, cpu, 64, Silent(), allow_overlap=allowed
        ).overlap

    for name in ("declared", "reused"):
        with pytest.raises(UsageError, match=r"held\.jsonl \(1/2\): was used to calibrate"):
            measured(name)
    assert measured("declared", allowed=True) == ("held.jsonl (1/2)",)


def test_documents_that_were_calibrated_on_are_left_out(root: Path, tmp_path: Path) -> None:
    """Figures are those of the file without it, of directories and of an engine; it is counted."""
    planted = json.loads((root / "texts.jsonl").read_text().splitlines()[0])["text"]
    rows = [
        json.dumps({"text": json.loads(line)["text"]})
        for line in write_texts(tmp_path / "new", seed=1).read_text().splitlines()[:3]
    ]
    clean, mixed = tmp_path / "clean.jsonl", tmp_path / "mixed.jsonl"
    clean.write_text("\n".join(rows))
    mixed.write_text("\n".join([rows[0], json.dumps({"text": planted}), *rows[1:]]))

    def measured(original: str, held: Path, *, skip: bool) -> dict[str, Any]:
        wanted = Wanted(
            original=original,
            pruned=str(root / "declared"),
            texts=TextOptions(paths=(held,), tokens=128, length=64),
            skip_overlap=skip,
        )
        return measure(wanted, Silent()).to_json()

    with Computed(root / "m") as engine:
        for original in (str(root / "m"), engine.url):
            found = measured(original, mixed, skip=True)
            assert (found["left_out"], found["overlap"]) == ({"mixed.jsonl": 1}, [])
            other = measured(original, clean, skip=True)
            assert other["left_out"] == {}
            assert found["quality"] == other["quality"]
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"text": planted}))
    with pytest.raises(UsageError, match=r"known\.jsonl: hold no document"):
        measured(str(root / "m"), known, skip=True)
    with pytest.raises(UsageError, match=r"texts\.jsonl: was used to calibrate"):
        measured(str(root / "m"), root / "texts.jsonl", skip=True)


def test_overlaps_are_skipped_or_allowed(root: Path) -> None:
    """Not both."""
    places = [str(root / "m"), str(root / "declared"), "--texts", str(root / "texts.jsonl")]
    done = CliRunner().invoke(app, ["compare", *places, "--allow-overlap", "--skip-overlap"])
    assert isinstance(done.exception, UsageError)
    assert "contradict each other" in str(done.exception)


def test_personal_data_leaves_no_hashes_of_passages(root: Path) -> None:
    """The file's own hash stays."""
    record = Manifest.load(root / "personal").calibration or {}
    assert record["passages"]["sha256_64"] == ""
    assert len(record["sources"][0]["sha256"]) == 64
    other = Manifest.load(root / "undeclared").calibration or {}
    assert other["passages"]["sha256_64"] != ""
