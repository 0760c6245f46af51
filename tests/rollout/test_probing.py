"""What two engines' log-probabilities say of each other, by hand and against the exact value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import numpy as np
import pytest

from moe_serve.errors import CalibrationError, RolloutError, UsageError
from moe_serve.rollout.policy import Probes
from moe_serve.rollout.probes import Probe, load_probes
from moe_serve.rollout.probing import Engine, Heard, NoPriority, compare
from moe_serve.serving.logprobs import Place, divergence

PROBE = Probe("id", "letters", "a secret text that is long enough to be gone on with")


def place(probabilities: dict[int, float], *, top: int = 20) -> Place:
    """From probabilities; the first ``top`` of them count as the likeliest."""
    logs = {token: math.log(p) for token, p in probabilities.items()}
    ranked = sorted(logs.values(), reverse=True)[:top]
    return Place(logs, ranked[-1], max(logs, key=lambda t: logs[t]))


def test_divergence_by_hand() -> None:
    """Shared {1}, only the original's {2}, pruned's least 0.1; rest 0.1 against 1 - 0.3.

    0.6·ln(0.6/0.3) + 0.3·ln(0.3/0.1) + 0.1·ln(0.1/0.7).
    """
    p, q = place({1: 0.6, 2: 0.3}), place({1: 0.3, 3: 0.1})
    expected = 0.6 * math.log(2) + 0.3 * math.log(3) + 0.1 * math.log(0.1 / 0.7)
    assert divergence(p, q, 2.0) == pytest.approx(expected)
    assert divergence(p, p, 2.0) == 0.0
    assert divergence(place({1: 0.999}), place({2: 0.999, 1: 1e-9}), 2.0) == 2.0


def test_it_is_a_lower_bound_and_near() -> None:
    """Against the exact divergence of a hundred random pairs over 50 tokens, from 20 of each."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(100):
        logits = rng.normal(0.0, 2.0, 50)
        p, q = (np.exp(v - np.logaddexp.reduce(v)) for v in (logits, logits + rng.normal(0, 1, 50)))
        exact = float((p * np.log(p / q)).sum())
        lists = [{int(t): float(v[t]) for t in np.argsort(-v)[:20]} for v in (p, q)]
        found = divergence(place(lists[0]), place(lists[1]), 100.0)
        assert found <= exact + 1e-9
        shares.append(found / exact)
    assert np.mean(shares) > 0.75


def test_the_text_own_token_does_not_lower_the_bound() -> None:
    """VLLM lists the token that stands there too, however unlikely: rank 21 is not the least."""
    answer = {"5": {"logprob": -9.0, "rank": 40}, "1": {"logprob": -0.1, "rank": 1},
              "2": {"logprob": -3.0, "rank": 2}}  # fmt: skip
    heard = ask({"prompt_logprobs": [None, answer]}, top=2)
    (found,) = heard.places
    assert (found.least, found.first, len(found.listed)) == (-3.0, 1, 3)


def test_no_number_is_the_worst() -> None:
    """NaN, or null as JSON has it: not agreement, not nothing."""
    bad = {"1": {"logprob": None, "rank": 1}}
    good = {"1": {"logprob": -0.1, "rank": 1}}
    original = ask({"prompt_logprobs": [None, good, good]})
    pruned = ask({"prompt_logprobs": [None, good, bad]})
    found = compare("d", original, pruned, 2.0)
    assert (found.kl, found.disagreement) == (1.0, 0.5)


def ask(choice: dict[str, object], *, top: int = 20, status: int = 200, says: str = "") -> Heard:
    """One probe put to an engine that answers so."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert (body["temperature"], body["priority"] > 0) == (0.0, True)
        if status != 200:
            return httpx.Response(status, text=says)
        if not body.get("stream"):
            assert (body["prompt"], body["max_tokens"]) == (PROBE.text, 1)
            return httpx.Response(200, json={"choices": [{"finish_reason": "length", **choice}]})
        assert PROBE.text.startswith(body["prompt"])
        assert body["prompt"] != PROBE.text
        lines = [{"text": c, "finish_reason": None} for c in "words"]
        lines.append({"text": "!", "finish_reason": "stop"})
        text = "".join(f"data: {json.dumps({'choices': [c]})}\n\n" for c in lines)
        return httpx.Response(200, text=text + "data: [DONE]\n\n")

    client = httpx.Client(transport=httpx.MockTransport(answer))
    engine = Engine(name="pruned engine", url="http://e", model="m")
    return engine.ask(client, PROBE, top=top, tokens=16, priority=True)


def test_what_is_heard() -> None:
    """Two requests: one cut at its one token, one that ended by itself after six."""
    heard = ask({"prompt_logprobs": [None, {"1": {"logprob": -0.1, "rank": 1}}]})
    assert (heard.generated, heard.truncated, heard.flaw) == (6, 1, "")
    assert min(heard.waits) >= 0.0


@pytest.mark.parametrize(
    ("choice", "status", "says", "expected"),
    [
        ({}, 500, "", "status 500"),
        ({}, 200, "", "has not the form"),
        ({"prompt_logprobs": [None]}, 200, "", "no prompt_logprobs"),
        ({}, 400, PROBE.text, "status 400"),
    ],
)
def test_refusals_say_nothing_of_the_text(
    choice: dict[str, object], status: int, says: str, expected: str
) -> None:
    """The engine's words may hold the prompt: its status is enough."""
    with pytest.raises(RolloutError, match=expected) as caught:
        ask(choice, status=status, says=says)
    assert "secret" not in str(caught.value)


def test_a_refused_priority_is_told_apart() -> None:
    """So that it can be asked again without."""
    with pytest.raises(NoPriority):
        ask({}, status=400, says="Got priority 1000 but Priority scheduling is not enabled.")


def test_other_tokens_are_no_comparison() -> None:
    """Two tokenizers."""
    one = {"1": {"logprob": -0.1, "rank": 1}}
    a, b = ask({"prompt_logprobs": [None, one]}), ask({"prompt_logprobs": [None, one, one]})
    with pytest.raises(RolloutError, match="tokenizer"):
        compare("d", a, b, 2.0)


def test_the_packages_own_set() -> None:
    """Seven domains of five, as the simulation assumes; its hash does not depend on the order."""
    found = load_probes(Probes())
    assert set(found.domains.values()) == {5}
    assert {"japanese", "code"} < set(found.domains)
    assert len(found.domains) == 7
    assert load_probes(Probes()).digest == found.digest


def test_a_users_file(tmp_path: Path) -> None:
    """Beside the package's or alone; a change of one letter is another set."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"domain": "mine", "text": "a"}\n{"domain": "mine", "text": "b"}\n')
    alone = load_probes(Probes(texts=path, default=False))
    assert alone.domains == {"mine": 2}
    assert load_probes(Probes(texts=path)).domains["mine"] == 2
    path.write_text('{"domain": "mine", "text": "b"}\n{"domain": "mine", "text": "a"}\n')
    assert load_probes(Probes(texts=path, default=False)).digest == alone.digest
    path.write_text('{"domain": "mine", "text": "a"}\n{"domain": "mine", "text": "c"}\n')
    assert load_probes(Probes(texts=path, default=False)).digest != alone.digest
    path.write_text('{"domain": "mine", "text": "a secret"}\n' * 2)
    with pytest.raises(UsageError, match="twice") as caught:
        load_probes(Probes(texts=path))
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="there are none"):
        load_probes(Probes(default=False))
    with pytest.raises(CalibrationError, match="does not exist"):
        load_probes(Probes(texts=path.with_name("other.jsonl")))
