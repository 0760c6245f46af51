"""The page of a comparison, as a browser shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_serve.report.catalogue import LANGUAGES
from moe_serve.report.compared import comparison_page
from tests.support.accessible import barriers
from tests.support.browser import chromium

MARKUP = '<img src=x onerror="fail()">'


def figures(kl: float) -> dict[str, float]:
    """One row's figures; the ratio and the agreement follow from the divergence."""
    return {"kl_nats": kl, "perplexity_ratio": 1.0 + kl, "top1_agreement": 1.0 - kl}


def domain(kl: float) -> dict[str, Any]:
    """A domain with an interval of half to twice its figures."""
    return figures(kl) | {"tokens": 1234, "interval": interval(kl)}


def interval(kl: float) -> dict[str, Any]:
    """From half to twice."""
    return {"low": figures(kl / 2), "high": figures(2 * kl)}


def result(domains: dict[str, float]) -> dict[str, Any]:
    """What ``compare --json`` prints."""
    sizes = {"original": 2048, "pruned": 1024}
    return {
        "original": "a",
        "pruned": "b",
        "quality": {
            "kl": {"exact": True, "top": None},
            "mean": figures(0.1) | {"interval": interval(0.1)},
            "domains": {name: domain(kl) for name, kl in domains.items()},
        },
        "memory": {"expert_bytes": sizes, "total_bytes": sizes},
        "speed": {},
        "overlap": [],
        "left_out": {},
    }


def task(difference: float, half: float, p: float, verdict: str) -> dict[str, Any]:
    """A task's figures, of 120 items."""
    return {
        "items": 120,
        "original": 0.5,
        "pruned": 0.5 + difference,
        "difference": difference,
        "interval": {"low": difference - half, "high": difference + half, "half": half},
        "p": p,
        "only_original": 3,
        "left_out": 0,
        "verdict": verdict,
    }


def whole() -> dict[str, Any]:
    """With all there can be."""
    pair = {"original": 4.0, "pruned": 2.0, "ratio": 0.5}
    latency = {"ttft": {"unit": "ms", "statistics": {"mean": pair, "p99": pair}}}
    side = {"mean_tokens": 5.0, "flaws": {"empty": 0, "loop": 1, "script": 0, "broken": 0}}
    found = result({"code": 0.05, MARKUP: 0.25})
    found["quality"]["domains"]["one"] = figures(0.01) | {"tokens": 9, "interval": None}
    return found | {
        "speed": {
            "tool": "vllm bench serve",
            "throughput": {"output_throughput": {"unit": "tokens/s", **pair}},
            "latency": latency,
            "unlike": ["num_prompts"],
            "completed": {"original": 4, "pruned": 3},
            "failed": {"original": 0, "pruned": 1},
        },
        "held": {
            "load_seconds": {"definition": "", "original": 2.0, "pruned": None},
            "load_resident_bytes": {"definition": "", "original": 2048, "pruned": 1024},
        },
        "tasks": {
            "tool": "lm-eval 0.4.13",
            "tasks": [
                {"task": "cloze", "metric": "acc"}
                | task(-0.008, 0.005, 0.004, "worse")
                | {"left_out": 1},
                {"task": MARKUP, "metric": "acc"} | task(0.0, 0.0, 1.0, "same"),
            ],
            "mean": {"acc": task(0.004, 0.02, 0.7, "unsettled")},
            "overlap": [],
        },
        "generation": {
            "prompts": 3,
            "identical": 1,
            "median_first_divergence": 2.5,
            "answers": {"original": side, "pruned": side},
        },
    }


def test_the_page_opens(tmp_path: Path) -> None:
    """Worst domain first, markup as text, no message, no request, no sideways scrolling."""
    wrong: list[str] = []
    with chromium() as browser:
        for language in LANGUAGES:
            file = tmp_path / f"{language}.html"
            file.write_text(comparison_page(whole(), language), encoding="utf-8")
            shown = browser.new_page(viewport={"width": 390, "height": 800})
            shown.on("console", lambda message: wrong.append(message.text))
            shown.goto(file.as_uri())
            rows = shown.locator("#domains tbody tr").all_inner_texts()
            assert rows[0].split("\t")[:3] == [MARKUP, "0.25", "0.125 - 0.5"]
            assert rows[1].startswith("code")
            assert rows[2].split("\t") == ["one", "0.01", "", "1.010", "", "99 %", "", "9"]
            assert rows[3].split("\t")[1:3] == ["0.1", "0.05 - 0.2"]
            speeds = shown.locator("#speed tbody tr").all_inner_texts()
            assert speeds[1].split("\t") == ["ttft mean", "ms", "4", "2", "0.50"]
            held = [row.split("\t") for row in shown.locator("#held tbody tr").all_inner_texts()]
            assert [row[1:3] for row in held] == [["2 s", ""], ["2.0 KiB", "1.0 KiB"]]
            tasks = [row.split("\t") for row in shown.locator("#tasks tbody tr").all_inner_texts()]
            assert tasks[0][:5] == ["cloze", "acc (%)", "50.0", "49.2", "-0.8 ± 0.5"]
            assert tasks[0][6:] == ["0.004", "120 (121)"]
            assert tasks[1][0] == MARKUP
            assert [row[4] for row in tasks[1:]] == ["0.0 ± 0.0", "+0.4 ± 2.0"]
            assert len({row[5] for row in tasks}) == 3
            assert "1" in shown.locator("#speed-title ~ .risks").first.inner_text()
            answers = shown.locator("#answers tbody tr").all_inner_texts()
            assert answers[1].split("\t")[1:] == ["5.0", "0", "1", "0", "0"]
            assert shown.evaluate("document.documentElement.scrollWidth") <= 390
            assert barriers(shown) == []
            assert wrong == []
        browser.close()


@pytest.mark.parametrize(
    ("language", "words"), [("en", "No difference was measured"), ("ja", "差は測定されません")]
)
def test_a_model_and_itself(language: str, words: str) -> None:
    """No loss is named where there is none."""
    page = comparison_page(result({"code": 0.0, "prose": 0.0}), language)
    assert words in page
    assert "loses most" not in page
