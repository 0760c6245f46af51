"""The repository's own pages in the site: README is its home."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PAGES: Final = {
    "README.md": "index.md",
    "README.ja.md": "ja.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File at the repository's root → page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, with links as the site has them."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text)))
    return files


def linked(text: str) -> str:
    """A root page's links, seen from the site."""

    def target(found: re.Match[str]) -> str:
        name, anchor = found["name"], found["anchor"] or ""
        return f"]({PAGES.get(name, name.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\((?!https?:|#)(?P<name>[^)#]+)(?P<anchor>#[^)]*)?\)", target, text)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of other pages to those at the root."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
        markdown = markdown.replace(f"](../../{name}", f"](../{page}")
    return markdown
