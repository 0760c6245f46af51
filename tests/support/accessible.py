"""What a page must keep for keyboards, screen readers and weak eyes, told from its DOM."""

from __future__ import annotations

from typing import Final

from playwright.sync_api import Page

_RULES: Final = r"""() => {
  const found = new Set();
  const all = (selector) => [...document.querySelectorAll(selector)];
  const levels = all("h1,h2,h3,h4,h5,h6").map((h) => Number(h.tagName[1]));
  if (levels[0] !== 1 || levels.filter((l) => l === 1).length !== 1) found.add("one h1, first");
  levels.forEach((l, i) => {
    if (i && l > levels[i - 1] + 1) found.add(`h${l} below h${levels[i - 1]}`);
  });
  if (!document.documentElement.lang) found.add("no language");
  for (const svg of all("svg")) {
    const named = svg.getAttribute("role") === "img" && svg.getAttribute("aria-label");
    if (!named && !svg.closest("[aria-hidden=true]")) found.add("a picture without a name");
  }
  for (const c of all("input,select,button"))
    if (!c.labels?.length && !c.getAttribute("aria-label") && !c.textContent.trim())
      found.add("a control without a name");
  const seen = new Set();
  for (const { id } of all("[id]")) { if (seen.has(id)) found.add(`two ids ${id}`); seen.add(id); }
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls"])
    for (const element of all(`[${name}]`))
      for (const id of element.getAttribute(name).split(/\s+/))
        if (!document.getElementById(id)) found.add(`${name} leads nowhere: ${id}`);
  for (const table of all("table"))
    if (!table.querySelector("th[scope]")) found.add("a table without heads");
  for (const box of all("*")) {
    const sideways = ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    if (sideways && box.scrollWidth > box.clientWidth && box.tabIndex < 0)
      found.add("a box that no keyboard can scroll");
  }
  for (const svg of all("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map((t) => t.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // Letters leave the edges of their boxes free.
      if (wide > 2 && high > 0.3 * Math.min(a.height, b.height)) found.add("labels on one another");
    }));
  }
  const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const bright = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const colour = (text) => text.match(/[\d.]+/g).map(Number);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const text = bright(colour(e.closest("svg") ? style.fill : style.color));
    const behind = bright(ground(e));
    const ratio = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
    if (ratio < 4.5) found.add(`contrast ${ratio.toFixed(1)} of ${e.tagName}.${e.className}`);
  }
  return [...found];
}"""


def barriers(page: Page) -> list[str]:
    """What stands in somebody's way, in light and in dark; nothing: no rule is broken."""
    found: list[str] = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found += [f"{scheme}: {line}" for line in page.evaluate(_RULES)]
    return found
