"""Two engines by URL: figures by hand, from servers that list two tokens at each place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moe_serve.cli.compare import compare_command
from moe_serve.errors import CheckpointError, MoeServeError, ServingError
from moe_serve.evaluation.comparison import Comparison
from moe_serve.evaluation.generation import first_divergence, generation_json, side_by_side
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.serving.client import ServedModel
from moe_serve.serving.ports import free_port
from tests.support.upstream import Upstream


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Upstream, Upstream]]:
    """The second is unlike the first by half a nat, and prefers the other token."""
    with Upstream("a", free_port()) as first, Upstream("b", free_port()) as second:
        second.unlike = 0.5
        yield first, second


def url(engine: Upstream) -> str:
    """Where it listens."""
    return f"http://127.0.0.1:{engine.port}"


def compared(one: str, other: str, texts: TextOptions, top: int, concurrency: int) -> Comparison:
    """Both by URL."""
    wanted = Wanted(original=one, pruned=other, texts=texts, top=top, concurrency=concurrency)
    return measure(wanted, Silent())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty letters, which the server's tokenizer makes 2, 1 and so on."""
    path = tmp_path / "texts.jsonl"
    rows = [{"domain": name, "text": "ab" * 30} for name in ("one", "two")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_figures_by_hand(engines: tuple[Upstream, Upstream], texts: Path) -> None:
    """Original (1: e^-0.1, 2: e^-3), pruned (2: e^-0.6, 1: e^-3.5); 30 places.

    KL = e^-0.1·3.4 - e^-3·2.4 + r·ln(r / s) with r, s what each leaves. The loss per token is
    (0.1 + 3.0) / 2 and (0.6 + 3.5) / 2; the likeliest tokens always differ.
    """
    options = TextOptions(paths=(texts,), tokens=31, length=31)
    found = compared(url(engines[0]), url(engines[1]), options, 2, 3)
    r, s = (1 - math.exp(a) - math.exp(b) for a, b in ((-0.1, -3.0), (-0.6, -3.5)))
    expected = math.exp(-0.1) * 3.4 - math.exp(-3.0) * 2.4 + r * math.log(r / s)
    for quality in found.domains.values():
        assert quality.tokens == 30
        assert quality.figures.kl_nats == pytest.approx(expected)
        assert quality.figures.perplexity_ratio == pytest.approx(math.exp(2.05 - 1.55))
        assert quality.figures.top1_agreement == 0.0
    assert engines[0].asked[-1]["prompt"] == engines[1].asked[-1]["prompt"]
    assert found.to_json()["quality"]["kl"] == {"exact": False, "top": 2}
    assert found.to_json()["memory"] == {}


def test_an_engine_and_itself(engines: tuple[Upstream, Upstream], texts: Path) -> None:
    """Nothing differs, exactly."""
    options = TextOptions(paths=(texts,), tokens=32, length=16)
    found = compared(url(engines[0]), url(engines[0]), options, 2, 2)
    for quality in found.domains.values():
        assert quality.interval is None
        assert (quality.figures.kl_nats, quality.figures.perplexity_ratio) == (0.0, 1.0)


def test_an_engine_that_fails_is_named(engines: tuple[Upstream, Upstream], texts: Path) -> None:
    """With its URL and the status; nothing of the text."""
    options = TextOptions(paths=(texts,), tokens=32, length=16)
    with Upstream("c", free_port()) as broken:
        broken.fail_every = 1
        with pytest.raises(ServingError, match="status 500") as caught:
            compared(url(engines[0]), url(broken), options, 2, 2)
        assert url(broken) in str(caught.value)
        assert "abab" not in str(caught.value)
    with pytest.raises(ServingError, match="no answer"):
        compared(url(engines[0]), url(broken), options, 2, 2)


def test_an_engine_that_lists_less_than_asked_is_refused(
    engines: tuple[Upstream, Upstream], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens of three: a third may be likelier than the least of two, and there is no bound."""
    options = TextOptions(paths=(texts,), tokens=32, length=16)
    with pytest.raises(ServingError, match="fewer than the 3 tokens asked for"):
        compared(url(engines[0]), url(engines[1]), options, 3, 2)
    places: list[list[dict[str, object] | None]] = [[None], [None, *[{}] * 15], []]

    def answered(_self: object, _asked: object) -> dict[str, object]:
        return {"prompt_logprobs": places[0]}

    monkeypatch.setattr(ServedModel, "_complete", answered)
    while places:
        with pytest.raises(ServingError, match="prompt_logprobs"):
            compared(url(engines[0]), url(engines[1]), options, 2, 2)
        places.pop(0)


def test_side_by_side(engines: tuple[Upstream, Upstream], texts: Path) -> None:
    """Two tokens alike of 5 and 32; the pruned one's answers end in a loop; no text is kept."""
    addresses = [url(engine) for engine in engines]
    found = generation_json(side_by_side(addresses[0], addresses[1], texts, 64, 2, Silent()))
    assert (found["prompts"], found["identical"], found["median_first_divergence"]) == (2, 0, 2.0)
    assert [one["domain"] for one in found["each"]] == ["one", "two"]
    original, pruned = found["answers"]["original"], found["answers"]["pruned"]
    assert (original["mean_tokens"], pruned["mean_tokens"]) == (5.0, 32.0)
    assert sum(original["flaws"].values()) == 0
    assert pruned["flaws"] == {"empty": 0, "loop": 2, "script": 0, "broken": 0}
    assert "zzz" not in json.dumps(found)
    same = generation_json(side_by_side(addresses[0], addresses[0], texts, 64, 2, Silent()))
    assert (same["identical"], same["median_first_divergence"]) == (2, None)


def test_an_answer_that_ends_early_parts_at_its_end() -> None:
    """Alike as far as it goes."""
    assert first_divergence((1, 2), (1, 2, 3)) == 2
    assert first_divergence((1, 2), (1, 2)) is None


def invoke(*arguments: str) -> tuple[str, BaseException | None]:
    """What the command prints, and what it raises."""
    app = typer.Typer()
    app.command()(compare_command)
    done = CliRunner().invoke(app, list(arguments))
    return done.stdout, done.exception


def test_the_command(engines: tuple[Upstream, Upstream], texts: Path, tmp_path: Path) -> None:
    """Table, page, and the words that say what kind of KL it is; half a pair is refused."""
    page = tmp_path / "page.html"
    common = ["--texts", str(texts), "--tokens", "32", "--top", "2"]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"completed": 1, "output_throughput": 4.0, "mean_ttft_ms": 2.5}))
    more = ["--html", str(page), "--prompts", str(texts), "--bench", str(bench), str(bench)]
    said, wrong = invoke(url(engines[0]), url(engines[1]), *common, *more)
    assert wrong is None
    assert "lower bound, from the 2 likeliest" in said
    assert "0 of 2 answers are identical" in " ".join(said.split())
    assert "ttft mean" in said
    assert "2.500" in said
    assert "lower bound" in page.read_text()
    _, wrong = invoke(str(tmp_path), url(engines[1]), *common)
    assert isinstance(wrong, CheckpointError)
    _, wrong = invoke(url(engines[0]), url(engines[1]), *common, "--lang", "fr")
    assert isinstance(wrong, MoeServeError)
