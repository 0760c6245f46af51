"""A pilot on a tiny model: made, stopped and resumed, and shown by a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Formatter

import pytest
from playwright.sync_api import Browser
from typer.testing import CliRunner

from moe_serve.cli.pilot import pilot_command
from moe_serve.errors import UsageError
from moe_serve.evaluation import comparison
from moe_serve.pilot import run as module
from moe_serve.pilot.page import page
from moe_serve.pilot.run import Pilot, run
from moe_serve.pilot.settings import Prices, load_settings
from moe_serve.progress import Silent
from moe_serve.report.catalogue import LANGUAGES, Catalogue
from tests.support.accessible import barriers
from tests.support.browser import chromium
from tests.support.models import make_model, write_texts

NAME = '<img src=x onerror="fail()">'
SETTINGS = """
model = '{model}'
calibration = ["texts.jsonl"]
texts = ["held.jsonl"]
output = "out"
keep = [0.75, 0.5]
methods = ["drop-frequency"]
tokens = 512
sequence_length = 64
[hardware]
gpu = "1MiB"
kv_tokens = 16
[tolerance]
mean_kl_nats = 10
worst_kl_nats = 10
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose name is markup, texts, and a pilot.toml."""
    folder = tmp_path_factory.mktemp("pilot")
    make_model(folder / NAME, "qwen3_moe", experts=8, width=64)
    write_texts(folder / "texts.jsonl")
    write_texts(folder / "held.jsonl", seed=1)
    (folder / "pilot.toml").write_text(SETTINGS.format(model=NAME))
    return folder


@pytest.fixture(scope="module")
def pilot(root: Path) -> Pilot:
    """Stopped after its first option, then run to the end."""
    settings = load_settings(root / "pilot.toml")
    with pytest.MonkeyPatch.context() as patch:
        measured = comparison.compare

        def stopped(*arguments: object, **options: object) -> object:
            found = measured(*arguments, **options)  # type: ignore[arg-type]
            patch.setattr(module, "compare", _killed)
            return found

        patch.setattr(module, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(settings, Silent())
    first = settings.output / "results" / "drop-frequency-0.75.json"
    before = first.stat().st_mtime_ns
    found = run(settings, Silent())
    assert first.stat().st_mtime_ns == before
    return found


def _killed(*_arguments: object, **_options: object) -> object:
    raise KeyboardInterrupt


def test_each_option_is_measured_once_and_fits(pilot: Pilot) -> None:
    """Fewer bytes, never more than asked for; the second was pruned before the run was stopped."""
    sizes = [option.expert_bytes / pilot.baseline.expert_bytes for option in pilot.options]
    assert [o.name for o in pilot.options] == ["drop-frequency-0.75", "drop-frequency-0.5"]
    assert 0.6 < sizes[0] <= 0.75
    assert 0.4 < sizes[1] <= 0.5
    assert all(option.machine_seconds > 0 for option in pilot.options)
    assert pilot.options[1].mean_kl > pilot.options[0].mean_kl > 0


def test_other_settings_in_the_same_folder_are_refused(pilot: Pilot, root: Path) -> None:
    """Prices and tolerances may change; what was measured may not."""
    text = (root / "pilot.toml").read_text()
    other = root / "other.toml"
    other.write_text(text.replace("tokens = 512", "tokens = 256"))
    with pytest.raises(UsageError, match="other settings"):
        run(load_settings(other), Silent())
    other.write_text(text.replace("kv_tokens = 16", "kv_tokens = 32"))
    assert run(load_settings(other), Silent()).options[0].mean_kl == pilot.options[0].mean_kl


def test_texts_that_share_documents_are_refused(pilot: Pilot, root: Path) -> None:
    """Before any option is made: one document of the calibration in a file of another name."""
    other = root / "planted.toml"
    text = (root / "pilot.toml").read_text().replace("held.jsonl", "planted.jsonl")
    other.write_text(text.replace('"out"', '"planted"'))
    first = (root / "texts.jsonl").read_text().splitlines()[0]
    (root / "planted.jsonl").write_text(f"{first}\n{(root / 'held.jsonl').read_text()}")
    with pytest.raises(UsageError, match=r"planted\.jsonl \(1/25\): was used for calibration"):
        run(load_settings(other), Silent())
    assert not list((root / "planted").glob("drop-*"))
    assert pilot.options[0].overlap == ()
    skipping = other.read_text().replace('"planted"', '"skipped"').replace("[0.75, 0.5]", "[0.75]")
    other.write_text(f"skip_overlap = true\n{skipping}")
    found = run(load_settings(other), Silent())
    assert found.options[0].left_out == {"planted.jsonl": 1}
    assert found.options[0].mean_kl == pytest.approx(pilot.options[0].mean_kl)
    assert "calibrated on and left out of the measurement: 1" in page(found, "en")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests here."""
    with chromium() as started:
        yield started


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_opens(
    pilot: Pilot, browser: Browser, tmp_path: Path, language: str, width: int
) -> None:
    """Figures as measured, markup as text, no message, no request, no sideways scrolling."""
    file = tmp_path / "page.html"
    file.write_text(page(pilot, language), encoding="utf-8")
    shown, wrong = browser.new_page(viewport={"width": width, "height": 800}), []
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("request", lambda asked: wrong.append(asked.url) if asked.url[:4] == "http" else None)
    shown.goto(file.as_uri())
    assert NAME in shown.inner_text("h1")
    rows = shown.locator("#measured tbody tr").all_inner_texts()
    assert len(rows) == 3
    assert any("texts.jsonl" in risk for risk in shown.locator("li").all_inner_texts())
    assert f"{pilot.options[1].mean_kl:.3g}" in rows[2]
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert barriers(shown) == []
    assert wrong == []
    shown.close()


@pytest.mark.parametrize(
    ("language", "saves", "none"),
    [("en", "saves no money", "no card fewer"), ("ja", "節約額はありません", "減りません")],
)
def test_a_card_for_nothing_is_still_a_card_less(
    pilot: Pilot, language: str, saves: str, none: str
) -> None:
    """Two of four cards saved at a price of zero: no payback, but not «no card fewer»."""
    settings = pilot.settings.model_copy(update={"prices": Prices(gpu_hour=0)})
    fewer = replace(
        pilot,
        settings=settings,
        baseline=replace(pilot.baseline, gpus=4),
        options=tuple(replace(option, gpus=2) for option in pilot.options),
    )
    text = page(fewer, language)
    assert saves in text
    assert none not in text


def test_quality_that_is_not_told_apart_is_not_called_better(pilot: Pilot) -> None:
    """The reason names the others instead; where nothing overlaps it says so."""
    settings = pilot.settings.model_copy(update={"prefer": "quality"})

    def told(high: float) -> str:
        one, other = pilot.options
        ends = [(0.9 * one.mean_kl, high), (high * 0.99, 9.0)]
        options = (
            replace(o, gpus=1, mean_kl_low=low, mean_kl_high=top)
            for o, (low, top) in zip((one, other), ends, strict=True)
        )
        return page(replace(pilot, settings=settings, options=tuple(options)), "en")

    assert "do not tell it from drop-frequency-0.5" in told(1.0)
    apart = replace(
        pilot,
        settings=settings,
        options=tuple(
            replace(o, gpus=1, mean_kl_low=o.mean_kl, mean_kl_high=o.mean_kl) for o in pilot.options
        ),
    )
    assert "it loses least, also by the 95 % intervals" in page(apart, "en")


def test_the_command_prints_what_it_measured(pilot: Pilot, root: Path) -> None:
    """``--json`` holds options, the recommendation and the pages; prices are read anew."""
    import typer

    app = typer.Typer()
    app.command()(pilot_command)
    done = CliRunner().invoke(app, [str(root / "pilot.toml"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["recommended"] == "drop-frequency-0.5"
    assert len(found["options"]) == len(pilot.options)
    for option in found["options"]:
        assert option["mean_kl_low"] < option["mean_kl"] < option["mean_kl_high"]
    assert all(Path(path).exists() for path in found["pages"].values())


def test_the_template_is_read_by_what_reads_it(tmp_path: Path) -> None:
    """``--init`` writes a file that names every field right, and does not overwrite it."""
    import typer

    app = typer.Typer()
    app.command()(pilot_command)
    target = tmp_path / "pilot.toml"
    assert CliRunner().invoke(app, [str(target), "--init"]).exit_code == 0
    assert load_settings(target).model == tmp_path / "model"
    assert isinstance(CliRunner().invoke(app, [str(target), "--init"]).exception, UsageError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("keep = [0.5, 0.5]", "not name anything twice"),
        ("keep = [0.50000001, 0.5]", "not name anything twice"),
        ("keep = [1.5]", "keep.0"),
        ('texts = ["texts.jsonl"]', "other texts"),
        ("allow_overlap = true\nskip_overlap = true", "contradict each other"),
        ('colour = "red"', "colour"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, change: str, words: str) -> None:
    """By name, before anything is made."""
    field = change.split(" = ", maxsplit=1)[0]
    lines = [x for x in SETTINGS.format(model="m").splitlines() if not x.startswith(f"{field} =")]
    (tmp_path / "pilot.toml").write_text("\n".join([change, *lines]))
    with pytest.raises(UsageError, match=words):
        load_settings(tmp_path / "pilot.toml")


def test_both_languages_say_the_same() -> None:
    """Keys and placeholders."""
    fields = [
        {
            key: {name for _, name, _, _ in Formatter().parse(text) if name}
            for key, text in Catalogue.of(language, "moe_serve.pilot").messages.items()
        }
        for language in LANGUAGES
    ]
    assert fields[0] == fields[1]
