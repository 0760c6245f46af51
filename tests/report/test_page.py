"""The report of a real pruned checkpoint, as a browser shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.errors import CheckpointError
from moe_serve.files import write_json
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.report import page as page_module
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.facts import Facts
from moe_serve.report.page import render, report
from tests.support.accessible import barriers
from tests.support.browser import chromium
from tests.support.models import make_model

NAME = '<img src=x onerror="fail()">'
DOMAINS = ("</script><script>fail()</script>", "vowels")
EXPERTS, WIDTH = 8, 64


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose name and domains are markup, at half its bytes and by merging."""
    root = tmp_path_factory.mktemp("report")
    model = make_model(root / NAME, "qwen3_moe", experts=EXPERTS, width=WIDTH)
    texts = root / "texts.jsonl"
    rows = [{"domain": DOMAINS[0], "text": "bcdfg " * 40}]
    rows += [{"domain": DOMAINS[1], "text": "aeiou " * 40} for _ in range(9)]
    texts.write_text("\n".join(map(json.dumps, rows)))
    wanted = {
        "neurons": Selection(keep=0.5, method="block-obs"),
        "merged": Selection(keep=0.5, method="merge-cka", drop_when_better=False),
    }
    for name, selection in wanted.items():
        request = PruneRequest(
            model=model,
            output=root / name,
            texts=TextOptions(paths=(texts,), tokens=2048, length=64),
            selection=selection,
            batch_tokens=512,
        )
        write_json(root / f"{name}.json", prune(request, Silent()).to_json())
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests here."""
    with chromium() as started:
        yield started


def opened(browser: Browser, folder: Path, text: str) -> tuple[Page, list[str]]:
    """A page showing ``text``, and what went wrong: messages, errors, requests beyond the file."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("data:", file.as_uri())) else wrong.append(request.url)
        ),
    )
    page.goto(file.as_uri())
    return page, wrong


def rows(page: Page, selector: str) -> list[list[str]]:
    """Cells of a table's body; closed details do not hide them here."""
    return [
        [cell.strip() for cell in row.locator("th, td").all_text_contents()]
        for row in page.locator(f"{selector} tbody tr").all()
    ]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_says_what_the_plan_says(
    language: str, pruned: Path, browser: Browser, tmp_path: Path
) -> None:
    """No error, no request, no markup from names run; tables hold the plan's numbers."""
    text = report(pruned / "neurons", language=language, run_file=pruned / "neurons.json")
    assert len(text.encode()) < 5_000_000
    page, wrong = opened(browser, tmp_path, text)
    assert page.locator("html").get_attribute("lang") == language
    assert NAME in page.locator("h1").inner_text()
    assert page.locator("h1 img").count() == 0
    plan = Plan.load(pruned / "neurons/plan.json")
    budget = rows(page, "#budget")
    assert [(int(row[0]), row[1]) for row in budget] == [
        (index, f"{layer.neurons_kept():,}") for index, layer in plan.layers.items()
    ]
    for index, layer in plan.layers.items():
        table = rows(page, f"details[data-layer='{index}'] table.experts")
        assert [int(row[2]) for row in table] == layer.why["neurons_kept"]
    # Whatever stands beside a picture, its panel or its layer holds a table too.
    for picture in page.locator("section svg").all():
        panel = picture.locator("xpath=ancestor::*[@class='panel figure-box' or @data-layer][1]")
        assert panel.locator("table").count() > 0
    page.fill("input[name=words]", "l0 e3")
    shown = {"en": f"1 of {2 * EXPERTS} experts", "ja": f"{2 * EXPERTS}個中 1個を表示"}
    assert page.locator("#matches").inner_text() == shown[language]
    page.fill("input[name=words]", "")
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert barriers(page) == []
    assert wrong == []
    page.close()


def test_the_filter_narrows_and_names_what_is_left(
    pruned: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words, outcome and domain; layers that are built late obey it too; the keyboard is enough."""
    monkeypatch.setattr(page_module, "_MANY", 4)
    text = report(pruned / "neurons", language="en")
    page, wrong = opened(browser, tmp_path, text)
    # The first layer is open, the second exists as a template only.
    assert page.locator(".card").count() == EXPERTS
    assert page.locator("#matches").inner_text() == f"{2 * EXPERTS} of {2 * EXPERTS} experts"
    page.locator("input[name=words]").press_sequentially("l1 e3")
    expect(page.locator("#matches")).to_have_text(f"1 of {2 * EXPERTS} experts")
    page.locator("details[data-layer='1'] > summary").press("Enter")
    expect(page.locator(".card:visible")).to_have_count(1)
    assert page.locator(".card:visible").inner_text().startswith("E3")
    page.locator("button[type=reset]").click()
    page.select_option("select[name=domain]", DOMAINS[0])
    index = json.loads(page.locator("#experts").text_content() or "")
    wanted = [row for row in index if DOMAINS[0] in row[3]]
    page.locator("#matches", has_text=f"{len(wanted)} of").wait_for()
    expect(page.locator(".card:visible")).to_have_count(len(wanted))
    assert wrong == []
    page.close()


def test_alternatives_of_a_layer_show_what_they_lack_before_and_after(
    pruned: Path, browser: Browser, tmp_path: Path
) -> None:
    """What was re-fitted comes first, the best before the others; an empty cell is explained."""
    folder = pruned / "neurons"
    facts = Facts.read(folder, evidence=Evidence.load(folder), quality=None, run=None)
    weighed = {"drop-naee": (0.5, 0.3), "merge-cka": (2.0, None), "block-obs": (0.25, 0.1)}
    first = replace(facts.layers[0], alternatives=weighed, taken="block-obs")
    text = render(replace(facts, layers=(first, *facts.layers[1:])), Catalogue.of("en"))
    page, wrong = opened(browser, tmp_path, text)
    shown = page.locator("details[data-layer='0']")
    assert rows(page, "details[data-layer='0'] table.alternatives") == [
        ["block-obs ✓", "0.25", "0.1"],
        ["drop-naee", "0.5", "0.3"],
        ["merge-cka", "2", ""],
    ]
    assert "Empty: so far behind" in (shown.text_content() or "")
    assert page.locator("details[data-layer='1'] table.alternatives").count() == 0
    assert wrong == []
    page.close()


def test_merged_experts_are_shown_with_their_mates(
    pruned: Path, browser: Browser, tmp_path: Path
) -> None:
    """Every shared block is a group, with its members and how alike they are."""
    text = report(pruned / "merged", language="en")
    page, wrong = opened(browser, tmp_path, text)
    plan = Plan.load(pruned / "merged/plan.json").layers[0]
    owners = [owned for owned in plan.table().owners() if len(owned) > 1]
    assert owners
    shown = {row[1] for row in rows(page, "details[data-layer='0'] table.groups")}
    assert shown == {", ".join(f"E{e}" for e in owned) for owned in owners}
    assert wrong == []
    page.close()


def test_risks_name_what_calibration_missed(pruned: Path, tmp_path: Path) -> None:
    """A domain of few tokens; quality not measured; a form that saves nothing."""
    export(pruned / "neurons", tmp_path / "tied", "tied", Silent())
    text = report(pruned / "neurons", language="en")
    tokens = Manifest.load(pruned / "neurons").calibration["tokens"]  # type: ignore[index]
    # Nine documents against one: the one holds a tenth, less than a quarter of an even half.
    assert tokens[DOMAINS[0]] < sum(tokens.values()) / 2 / 4
    assert f"barely covered {escape(DOMAINS[0])}: {tokens[DOMAINS[0]]} tokens" in text
    assert "was not measured" in text
    tied = report(tmp_path / "tied", language="en")
    assert "full-size form saves none" in tied


def test_a_checkpoint_without_evidence_is_refused(pruned: Path, tmp_path: Path) -> None:
    """With what to do about it; so is one whose plan is another's."""
    with pytest.raises(CheckpointError, match="holds no evidence"):
        report(tmp_path, language="en")
    for name in ("evidence.json", "moe_serve.json"):
        (tmp_path / name).write_bytes((pruned / "neurons" / name).read_bytes())
    (tmp_path / "plan.json").write_bytes((pruned / "merged/plan.json").read_bytes())
    with pytest.raises(CheckpointError, match="is not the plan"):
        report(tmp_path, language="en")
