"""The page in a real browser, on a real proxy and controller."""

from __future__ import annotations

import json
import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from benchmarks.fixtures import MODEL
from moe_serve.rollout import control, controller
from moe_serve.rollout.commands import start_rollout
from moe_serve.rollout.decision import Decision, judge
from moe_serve.rollout.margins import Guards, ShareGuard
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.probing import Result
from moe_serve.rollout.quality import NOTHING, Quality
from moe_serve.rollout.said import join, say
from moe_serve.rollout.schema import DecisionOut, PointOut
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move
from moe_serve.rollout.web import charts, words
from moe_serve.rollout.web.shown import waits
from moe_serve.rollout.window import Window
from moe_serve.serving.routes import read_split
from moe_serve.serving.state import StackState
from moe_serve.serving.token import read_token
from tests.support.browser import chromium
from tests.support.control import serving
from tests.support.proxy import Proxied, proxied

NAME = """Qwen3 <img src=x onerror=alert(1)> "'><script>alert(2)</script>"""
POLICY = """
interval_seconds = 0.3
warmup_seconds = 0
strata = []
cooldown_seconds = 3600
[guards]
quality = "off"
garbage = "off"
[[steps]]
weight = 50
min_seconds = 3600
[[steps]]
weight = 75
gate = "hand"
"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A stack and a browser to look at it."""

    proxy: Proxied
    address: str
    browser: Browser

    def open(self, *, width: int = 1280, signed_in: bool = False, **context: Any) -> Page:
        """A new page, whose console, dialogs and requests are watched."""
        page = self.browser.new_context(
            viewport={"width": width, "height": 844}, **context
        ).new_page()
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type != "info" else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: wrong.append(d.message))
        page.on("request", lambda r: wrong.append(r.url) if self.elsewhere(r.url) else None)
        page.wrong = wrong  # type: ignore[attr-defined]
        if signed_in:
            page.goto(f"{self.address}/login")
            page.get_by_label("Control token").fill(read_token(self.proxy.state))
            page.get_by_role("main").get_by_role("button", name="Sign in").click()
        else:
            page.goto(self.address)
        return page

    def elsewhere(self, url: str) -> bool:
        """Whether a request leaves the control process."""
        return not url.startswith(f"{self.address}/")


def wrong(page: Page) -> list[str]:
    """What should not have happened in it."""
    return list(page.wrong)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Envoy, upstreams, controller, control process, Chromium."""
    state = tmp_path_factory.mktemp("page")
    (state / "policy.toml").write_text(POLICY)
    with (
        proxied(state, chunks=1, pause=0.0, model=MODEL, served_model=NAME) as proxy,
        pytest.MonkeyPatch.context() as patch,
        chromium() as browser,
    ):
        stack = StackState.load(state)
        object.__setattr__(stack, "policy", str(state / "policy.toml"))
        stack.save(state)
        # A rollout that begins is seen at once.
        patch.setattr(controller, "_IDLE", 0.3)
        patch.setattr(control, "_LOOK", 0.5)
        thread, stop = controller.start(state, lambda _: None)
        with serving(state) as address:
            yield Seen(proxy=proxy, address=address, browser=browser)
        stop.set()
        thread.join(10)


@pytest.fixture
def seen(running: Seen) -> Seen:
    """With everything on the original, and no rollout under way."""
    move(running.proxy.state, 0, decision="rollback", reason="between tests")
    return running


def test_a_person_rolls_out_and_back_while_another_watches(seen: Seen) -> None:
    """Start, pause, resume, promote, roll back; whoever watches sees each by events alone."""
    watching = seen.open(width=390)
    expect(watching.locator("#pulse")).to_have_text("Live")
    acting = seen.open(signed_in=True)
    state = watching.locator("#state .chip")

    def act(name: str) -> None:
        acting.locator("#act").get_by_role("button", name=name, exact=True).click()

    act("Start")
    expect(state).to_have_text("Canary")
    expect(watching.locator("#share-pruned")).to_have_text("50 %")
    expect(watching.locator(".guard svg.bar").first).to_be_visible()
    with httpx.Client() as client:
        for _ in range(40):
            client.post(f"{seen.proxy.endpoint}/completions", json={})
    counts = watching.locator(".guard", has_text="Failed requests").locator(".counts")
    expect(counts).to_contain_text(re.compile(r"0 of [1-9]"))
    expect(watching.locator(".guard svg.band").first).to_be_visible()
    act("Pause")
    expect(state).to_have_text("Paused")
    act("Resume")
    expect(state).to_have_text("Canary")
    acting.locator("#act summary", has_text="Promote").click()
    acting.locator("#promote-reason").fill("looks good")
    act("Send everything to the pruned model")
    expect(state).to_have_text("Promoted")
    expect(watching.locator("#share-pruned")).to_have_text("100 %")
    assert read_split(seen.proxy.state).percent == 100
    act("Roll back")
    expect(acting.get_by_role("status").first).to_have_text(
        "Everything goes to the original again."
    )
    expect(state).to_have_text("Rolled back")
    assert read_split(seen.proxy.state).percent == 0
    done = [c.decision for c in Store(seen.proxy.state).history(5)]
    assert done[:3] == ["rollback", "promote", "start"]
    assert {c.actor for c in Store(seen.proxy.state).history(3)} == {"page"}
    act("Start")
    expect(acting.get_by_role("alert")).to_contain_text("rolled back a short while ago")
    acting.get_by_role("link", name="Back").click()
    acting.locator("#act summary", has_text="cool-down").click()
    acting.locator("#force-reason").fill("found it")
    acting.locator("#act-force").click()
    expect(state).to_have_text("Canary")
    assert wrong(watching) == []
    # The browser notes the refused start, and nothing else.
    assert [w for w in wrong(acting) if "409" not in w] == []


def test_what_a_person_types_survives_an_update_and_keys_suffice(seen: Seen) -> None:
    """A half-typed reason and an open part stay; Tab reaches what acts, Enter does it."""
    page = seen.open(signed_in=True)
    page.locator("#more-set summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("30")
    page.keyboard.press("Tab")
    page.keyboard.type("half")
    move(seen.proxy.state, 12, decision="set", reason="someone else")
    expect(page.locator("#share-pruned")).to_have_text("12 %")
    expect(page.locator("#set-reason")).to_have_value("half")
    page.keyboard.type(" typed")
    page.keyboard.press("Enter")
    expect(page.locator("#share-pruned")).to_have_text("30 %")
    assert Store(seen.proxy.state).history(1)[0].reason == "half typed"
    page.locator("#act-rollback").focus()
    move(seen.proxy.state, 31, decision="set", reason="")
    expect(page.locator("#share-pruned")).to_have_text("31 %")
    expect(page.locator("#act-rollback")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#share-pruned")).to_have_text("0 %")
    assert wrong(page) == []


def test_it_reads_without_javascript_and_signed_out(seen: Seen) -> None:
    """Everything is there but what acts; a wrong token does not sign in."""
    move(seen.proxy.state, 7.5, decision="set", reason="look")
    page = seen.open(java_script_enabled=False)
    expect(page.locator("#share-pruned")).to_have_text("7.5 %")
    expect(page.get_by_role("heading", level=1)).to_have_text(NAME)
    for name in ("Guards", "Side by side", "Decisions"):
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.get_by_role("row", name="Weights")).to_contain_text("MiB")
    expect(page.locator("#decisions time").first).to_contain_text("UTC")
    assert page.get_by_role("button").count() == 0
    page.get_by_role("link", name="Sign in to act").click()
    page.get_by_label("Control token").fill("wrong")
    page.get_by_role("main").get_by_role("button").click()
    expect(page.get_by_role("alert")).to_have_text("That is not this stack's token.")
    page.get_by_label("Control token").fill(read_token(seen.proxy.state))
    page.get_by_role("main").get_by_role("button").click()
    page.locator("#act-rollback").click()
    expect(page.locator("#share-pruned")).to_have_text("0 %")
    page.get_by_role("button", name="Sign out").click()
    assert page.locator("#act-rollback").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1280, "light")])
def test_nothing_overflows_or_escapes(width: int, scheme: str, seen: Seen) -> None:
    """Names are text, wherever they stand; everything is within the width; letters stand out."""
    move(seen.proxy.state, 5, decision="set", reason=NAME, actor=NAME)
    page = seen.open(width=width, signed_in=True, color_scheme=scheme)
    expect(page).to_have_title(re.compile(re.escape(NAME)))
    expect(page.locator("#decisions .why").first).to_have_text(NAME)
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) >= 4.5
    assert wrong(page) == []


CONTRAST = """() => {
  const light = (c) => c.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number)
    .map((v, i) => c.startsWith("color(") && i < 3 ? v * 255 : v);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  let worst = 21;
  for (const e of document.querySelectorAll("body *:not(:disabled)")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg, .unseen, .skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(behind(e))];
    worst = Math.min(worst, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return worst;
}"""
"""The least contrast of any text with the ground behind it (WCAG 2.2, 1.4.3)."""


def test_quality_is_shown_per_domain(seen: Seen) -> None:
    """As soon as it is known: probes of two domains, one that loses 0.25 nats."""
    page = seen.open()
    expect(page.get_by_role("heading", name="Quality")).to_be_hidden()
    losses = {"code": 0.25, "news<b>": 0.01}
    found = Quality(digest="d", domains=dict.fromkeys(losses, 1))
    for name, kl in losses.items():
        found.add(name, Result(domain=name, kl=kl, disagreement=0.125, flaws=("", "")), 1.0)
    Store(seen.proxy.state).save_seen({"quality": found.to_json()})
    expect(page.get_by_role("row", name="code")).to_contain_text("0.2500", timeout=15_000)
    expect(page.get_by_role("row", name="news<b>")).to_contain_text("87.50 %")
    assert wrong(page) == []


def test_it_speaks_japanese(seen: Seen) -> None:
    """By what the browser accepts; English stays a click away, and is remembered."""
    page = seen.open(locale="ja-JP")
    assert page.locator("html").get_attribute("lang") == "ja"
    expect(page.get_by_role("heading", name="ガード")).to_be_visible()
    # What the controller says too: what it waits for, and what each guard compares.
    start_rollout(
        seen.proxy.state, Policy.model_validate(tomllib.loads(POLICY)), reason="", force=True
    )
    expect(page.locator("#guards .basis").first).to_contain_text("オリジナル", timeout=60_000)
    expect(page.locator("#state .verdict")).to_contain_text("待機中")
    found = page.locator("#state .waits li, #state .verdict, #guards .basis").all_inner_texts()
    assert len(found) > 5
    for text in found:
        assert re.search("[ぁ-んァ-ン一-龠]", text), text
        assert not re.search("[A-Za-z]{4}", text), text
    page.get_by_role("link", name="English").click()
    page.goto(seen.address)
    expect(page.get_by_role("heading", name="Guards")).to_be_visible()


def test_a_broken_state_is_said(seen: Seen) -> None:
    """With what to do about it, and no trace of the program."""
    from moe_serve.serving.routes import route_file

    file = route_file(seen.proxy.state)
    good = file.read_bytes()
    try:
        file.write_bytes(b"{")
        answer = httpx.get(seen.address)
    finally:
        file.write_bytes(good)
    assert answer.status_code == 503
    assert "moe-serve rollout rollback writes a good one" in answer.text


def test_every_word_is_there_in_both_languages() -> None:
    """With the same places to fill in; templates use no other keys."""
    folder = Path(words.__file__).parent
    catalogue = tomllib.loads((folder / "words.toml").read_text(encoding="utf-8"))
    for key, texts in catalogue.items():
        assert texts.keys() == words.LANGUAGES.keys(), key
        english, japanese = (
            {name for _, name, _, _ in string.Formatter().parse(text) if name}
            for text in texts.values()
        )
        assert english == japanese, key
    used = {
        key
        for file in (*folder.glob("*.html"), *folder.glob("*.py"))
        for key in re.findall(r"""words\(['"]([\w-]+)['"][,)]""", file.read_text(encoding="utf-8"))
    }
    assert len(used) > 60
    assert used <= catalogue.keys()
    often = ShareGuard(margin=0.1)
    policy = Policy(guards=Guards(feedback=often, abandoned=often))
    judged = judge(Window(began=0.0, weight=5.0), policy, policy.steps[2], NOTHING, explain=False)
    assert len(judged) == 11  # With the two that are off by default.
    assert {f"guard-{evidence.guard}" for evidence in judged} <= catalogue.keys()
    text = join([say("more", guard="errors", count="340", span=360), say("min-time", span=300)])
    made = Decision(kind="hold", reason="evidence", words=text, evidence=judged).to_json()
    decision = DecisionOut.model_validate(json.loads(json.dumps(made)))
    assert waits(decision, words.Words("ja")) == [
        "失敗したリクエスト: あと約 340 件(この頻度で6分)",
        "最短時間まであと5分",
    ]
    first = "Failed requests: about 340 more requests, 6 minutes at this rate"
    assert waits(decision, words.Words("en"))[0] == first
    by_hand = decision.model_copy(update={"words": "lunch", "codes": None})
    assert waits(by_hand, words.Words("ja")) == ["lunch"]


@pytest.mark.parametrize(
    ("asked", "accept", "expected"),
    [
        (None, "", "en"),
        (None, "fr, ja;q=0.5, en;q=0.4", "ja"),
        (None, "en-GB, ja", "en"),
        ("ja", "en", "ja"),
        ("xx", "ja-JP;q=nonsense, de", "en"),
    ],
)
def test_the_language_is_the_readers(asked: str | None, accept: str, expected: str) -> None:
    """What was asked for, else the best that is accepted, else English."""
    assert words.preferred(asked, accept) == expected


def test_pictures_are_to_scale() -> None:
    """The axis goes from -2 to 3 margins: zero at 2/5, the margin at 3/5 of 600."""
    found = charts.bar(-0.01, 0.02, 0.01)
    assert (found.zero, found.margin, found.start, found.length) == (240.0, 360.0, 120.0, 360.0)
    assert charts.bar(9.0, 9.0, 0.01) == charts.Bar(start=598.0, length=2.0, zero=240.0, margin=360)
    points = [
        PointOut(at=at, step=step, lower=-1.0, upper=upper, margin=0.01)
        for at, step, upper in ((0.0, 0, 1.0), (5.0, 0, 0.0), (10.0, 1, 0.03))
    ]
    band = charts.band(points, 0.01)
    assert band is not None
    assert band.areas[0] == (
        "M0.0,0.0 L300.0,72.0 L600.0,72.0 L600.0,120.0 L300.0,120.0 L0.0,120.0 Z"
    )
    assert (band.changes, band.zero, band.margin) == ((600.0,), 72.0, 48.0)
    assert charts.band(points[:1], 0.01) is None
