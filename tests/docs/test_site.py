"""The documentation as a site, and its pages that are written from the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from docs.tools.hooks import linked
from docs.tools.reference import FOLDER, pages
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.pruning.methods.view import Budget, LayerView
from tests.support.calibrated import calibrated
from tests.support.models import make_model

ROOT: Final = Path(__file__).parents[2]


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """No page is left out, no link is broken, no font or script comes over the network."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) > 20
    for page in built:
        text = page.read_text(encoding="utf-8")
        loads = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\s\">]+)", text)
        loads += re.findall(r"<link[^>]* href=\"?(https?:[^\s\">]+)", text)
        assert loads == [], page.name


def test_the_reference_is_current() -> None:
    """Whoever changes an option, a key or a metric writes it again."""
    made = pages()
    assert sorted(p.name for p in FOLDER.glob("*.md")) == sorted(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, (
            f"docs/reference/{name} is stale; run: python -m docs.tools.reference"
        )


def test_every_key_and_option_is_explained() -> None:
    """No row of a table without its meaning."""
    for name, text in pages().items():
        empty = re.findall(r"^\| `[^|]*\|.*\|\s+\|$", text, re.MULTILINE)
        assert empty == [], name


def test_links_of_root_pages_lead_into_the_site() -> None:
    """As seen from there; those to elsewhere stay."""
    text = "[a](docs/a.md) [b](README.ja.md) [c](https://c.d/e) [d](docs/d.md#x) [e](#f)"
    assert linked(text) == "[a](a.md) [b](ja.md) [c](https://c.d/e) [d](d.md#x) [e](#f)"


def test_the_method_of_the_how_to_works(tmp_path: Path) -> None:
    """``docs/how-to/method.md``, word by word, on a tiny model: half of the experts stay."""
    page = (ROOT / "docs" / "how-to" / "method.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)  # noqa: S102 - it is what is tested
    model = make_model(tmp_path / "model", "qwen3_moe")
    statistics = calibrated(model, tmp_path)
    view = LayerView.of(open_checkpoint(model), statistics, 0)
    plan = names["drop_specialists_last"](view, Budget(keep=0.5, block_width=64))  # type: ignore[operator]
    kept = [blocks for blocks in plan.experts if blocks is not None]
    assert len(kept) == len(plan.experts) // 2


@pytest.mark.parametrize("page", ["README", "docs/tutorial"])
def test_the_japanese_page_has_the_same_commands(page: str) -> None:
    """Word by word, comments aside."""

    def commands(path: Path) -> list[str]:
        blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        return [re.sub(r" +#.*", "", block) for block in blocks]

    assert commands(ROOT / f"{page}.ja.md") == commands(ROOT / f"{page}.md")
