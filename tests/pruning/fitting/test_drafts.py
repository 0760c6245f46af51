"""Drafts: drawn from what the original predicts, and nothing else than asked is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.sequences import Sequences
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.fitting.drafts import Tokens, with_drafts, write_drafts
from moe_serve.pruning.plan import Heal


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    """Seven domains of two sequences of 64 tokens."""
    texts = TextOptions(paths=(CALIBRATION,), tokens=128, length=64)
    corpus = load_corpus(open_checkpoint(MODEL), texts)
    assert corpus is not None
    return corpus.sequences


def drafts_of(
    sequences: Sequences, folder: Path, numbers: list[int], batch: int = 256, **settings: float
) -> list[Tokens]:
    """By the trained fixture."""
    decoder = Decoder(open_checkpoint(MODEL), torch.device("cpu"))
    by = Heal.model_validate(settings)
    return write_drafts(decoder, sequences, numbers, by, folder, batch, Silent())


def test_tokens_are_drawn_from_the_original_s_predictions(
    sequences: Sequences, tmp_path: Path
) -> None:
    """The mean surprise of what is drawn is the predictions' mean entropy, by transformers.

    14 x 63 draws: their mean lies within four standard errors of it; tokens of the text itself or
    of the place beside would not.
    """
    numbers = list(range(len(sequences.tokens)))
    drafts = drafts_of(sequences, tmp_path, numbers, rounds=1, drafts=1, redrawn=1.0)
    ids = torch.from_numpy(np.stack(sequences.tokens))
    drawn = torch.from_numpy(np.stack(drafts))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        logs = torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1)

    def surprise(tokens: torch.Tensor) -> torch.Tensor:
        return -logs.gather(2, tokens[:, 1:, None])[..., 0]

    entropy = -(logs.exp() * logs).sum(dim=-1)
    variance = (logs.exp() * logs.square()).sum(dim=-1) - entropy.square()
    error = variance.sum().sqrt() / variance.numel()
    assert torch.equal(drawn[:, 0], ids[:, 0])
    assert abs(surprise(drawn).mean() - entropy.mean()) < 4 * error
    assert surprise(drawn.roll(1, dims=1)).mean() - entropy.mean() > 20 * error


def test_a_round_starts_from_the_last_draft_of_the_one_before(
    sequences: Sequences, tmp_path: Path
) -> None:
    """Of 2 x 63 places 0.3 are drawn: 38, at most; the batch size changes none of them."""
    numbers = [1, 4]
    made = drafts_of(sequences, tmp_path, numbers, rounds=2, drafts=2, redrawn=0.3)
    first, second, third, fourth = made[::2]

    def changed(a: Tokens, b: Tokens) -> int:
        return int((a != b).sum())

    text = sequences.tokens[1]
    for draft, start in ((first, text), (second, text), (third, second), (fourth, second)):
        assert 5 <= changed(draft, start) <= 35
    assert changed(first, second) > 5
    assert changed(third, fourth) > 5
    assert min(changed(third, text), changed(fourth, text)) > changed(third, second)
    assert (made[1] != sequences.tokens[4]).any()
    again = drafts_of(sequences, tmp_path, numbers, batch=64, rounds=2, drafts=2, redrawn=0.3)
    assert all(np.array_equal(x, y) for x, y in zip(made, again, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("none", ["rounds", "drafts"])
def test_no_drafts_are_none(none: str, sequences: Sequences, tmp_path: Path) -> None:
    """A plan may ask for none of either."""
    assert drafts_of(sequences, tmp_path, [1, 4], **{none: 0}) == []


def test_drafts_stand_behind_the_texts_in_their_domains(sequences: Sequences) -> None:
    """Sequences 1 and 4 are of the first and the third domain; domains weigh alike as before."""
    rows = [np.full(64, number) for number in range(4)]
    both = with_drafts(sequences, [1, 4], rows)
    assert both.tokens[: len(sequences.tokens)] == sequences.tokens
    assert both.domain[-4:] == (0, 2, 0, 2)
    weights = both.weights()
    of_domain = [float(weights[both.token_domains() == d].sum()) for d in range(7)]
    assert of_domain == pytest.approx([both.total / 7] * 7)
