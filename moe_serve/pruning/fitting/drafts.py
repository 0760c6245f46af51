"""More calibration tokens without more texts: drafts that the original model writes into them.

What limits healing is how few tokens there are: every weight that is left is trained, and the
texts' own error falls much faster than that of others. The original answers for any input, so
inputs can be made: a draft is a sequence in which it has drawn some of the tokens anew, each from
its own prediction given what stands before. One forward pass, with one layer in memory, makes
several drafts of every sequence; the next pass starts from the last of them.

Close to knowledge distillation on a teacher's own samples (Kim & Rush 2016, arXiv 1606.07947), but
without generating token by token, for which all weights would have to be read for each.

Shape suffixes: B sequences, L tokens each, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from moe_serve.calibration.decoder import Decoder, OutputHead
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import batches, embed
from moe_serve.progress import Progress
from moe_serve.pruning.plan import Heal

Tokens = np.ndarray[Any, np.dtype[np.int64]]
LOGIT_TOKENS: Final = 1024
"""Tokens whose logits are held at once."""


def with_drafts(sequences: Sequences, numbers: list[int], drafts: list[Tokens]) -> Sequences:
    """All sequences, and behind them drafts of some, in rounds over ``numbers``."""
    domain = [sequences.domain[number] for number in numbers]
    return dataclasses.replace(
        sequences,
        tokens=(*sequences.tokens, *drafts),
        domain=(*sequences.domain, *domain * (len(drafts) // max(len(numbers), 1))),
        corpus=(),
    )


@torch.inference_mode()
def write_drafts(
    decoder: Decoder,
    sequences: Sequences,
    numbers: list[int],
    settings: Heal,
    folder: Path,
    batch_tokens: int,
    progress: Progress,
) -> list[Tokens]:
    """Drafts of some sequences, round after round over all of them.

    Peak memory: one layer, or the output matrix, and one batch.

    Args:
        decoder: the original's.
        sequences: the calibration tokens.
        numbers: the sequences that are redrafted; those held out must not be among them.
        settings: how many rounds and drafts, and how much of each is drawn anew.
        folder: for hidden states, in two files.
        batch_tokens: tokens in memory at once.
        progress: told about every layer.
    """
    drafts: list[Tokens] = []
    present = sequences.subset(numbers)
    rounds = settings.rounds if numbers and settings.drafts else 0
    progress.start("write drafts", rounds * decoder.layers)
    for done in range(rounds):
        with _predictions(decoder, present, folder, batch_tokens, progress) as (head, last):
            rows = list(zip(numbers, present.tokens, present.offsets, strict=True))
            for made in range(done * settings.drafts, (done + 1) * settings.drafts):
                tokens = tuple(
                    _redrawn(
                        ids, last.read(start, len(ids)), head, settings.redrawn, (made, number)
                    )
                    for number, ids, start in rows
                )
                drafts += tokens
        present = dataclasses.replace(present, tokens=tokens)
    return drafts


@contextmanager
def _predictions(
    decoder: Decoder, sequences: Sequences, folder: Path, batch_tokens: int, progress: Progress
) -> Iterator[tuple[OutputHead, States]]:
    """The output head, and the hidden states it reads; the files last as long as the context."""
    hidden = decoder.checkpoint.shape.hidden
    pair = tuple(States(folder / f"draft-{i}.f32", hidden) for i in (0, 1))
    parts = tuple(batches(sequences, batch_tokens, decoder.device))
    embed(decoder, sequences, pair[0])
    for index in range(decoder.layers):
        layer = decoder.layer(index)
        for batch in parts:
            r_BLD = layer.attend(batch.load(pair[index % 2]), decoder.rotary(*batch.shape))
            out_BLD = r_BLD + layer.feed_forward(layer.normed(r_BLD))
            batch.store(pair[(index + 1) % 2], out_BLD)
        del layer  # Freed before the next one is read.
        progress.advance()
    yield decoder.head(), pair[decoder.layers % 2]
    for states in pair:
        states.remove()


def _redrawn(
    ids: Tokens, x_LD: torch.Tensor, head: OutputHead, share: float, seed: tuple[int, int]
) -> Tokens:
    """A draft of one sequence; its first token stays, as nothing predicts it."""
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(rng.random(len(ids) - 1) < share)
    level = rng.random(len(chosen))
    made = ids.copy()
    for start in range(0, len(chosen), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        x_lD = x_LD[chosen[part]].to(head.weight_VD.device)
        sums_lV = torch.softmax(head(x_lD).double(), dim=-1).cumsum(dim=-1).cpu()
        level_l1 = torch.from_numpy(level[part])[:, None] * sums_lV[:, -1:]
        made[chosen[part] + 1] = torch.searchsorted(sums_lV, level_l1, right=True)[:, 0].clamp(
            max=sums_lV.shape[1] - 1
        )
    return made
