"""Quality of a pruned checkpoint against its original, both streamed layer by layer.

Shape suffixes: B sequences, L tokens of each, T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch, batches, embed
from moe_serve.checkpoint.finite import all_finite
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.evaluation.quality import Floats
from moe_serve.progress import Progress

LOGIT_TOKENS: Final = 1024
"""Tokens whose logits are held at once; T times V would not fit."""

Arranged = Callable[[Batch], tuple[torch.Tensor | None, torch.Tensor | None]]
"""Of a batch: each token's place in its text [B, L], and what attention sees [B, 1, L, L]."""


@torch.inference_mode()
def divergence(
    original: Checkpoint,
    pruned: Checkpoint,
    sequences: Sequences,
    work: Path,
    device: torch.device,
    batch_tokens: int,
    progress: Progress,
    reference: Path | None = None,
) -> list[Floats]:
    """For each sequence what its predicted tokens came to, as :data:`Floats` says.

    Memory: one layer, then two output matrices and the logits of 1,024 tokens. Hidden states of
    both models lie in ``work``.

    Args:
        original: the reference.
        pruned: compact, tied or native, or any other checkpoint with the same vocabulary.
        sequences: tokens of texts neither was calibrated on.
        work: an existing directory for temporary files.
        device: where to compute.
        batch_tokens: tokens at once.
        progress: told about layers.
        reference: keeps what the original put out, for further calls on the same tokens with
            another ``pruned``; made where it is missing.

    Raises:
        CheckpointError: the vocabularies differ, weights are damaged, or a model yields NaN.
    """
    if original.shape.vocabulary != pruned.shape.vocabulary:
        raise CheckpointError(
            f"has {pruned.shape.vocabulary} tokens in its vocabulary, "
            f"the original {original.shape.vocabulary}",
            where=str(pruned.path),
            remedy="compare checkpoints of one model",
        )
    kept = States(reference or work / "reference.f32", original.shape.hidden)
    known = reference is not None and kept.path.exists()
    layers = pruned.shape.layers + (0 if known else original.shape.layers)
    progress.start("compare", layers + 1)
    if not known:
        made = final_states(original, sequences, work / "original", device, batch_tokens, progress)
        # Under its own name only when it is whole; ``work`` may lie on another disk.
        shutil.move(made.path, kept.path.with_suffix(".partial"))
        kept.path.with_suffix(".partial").replace(kept.path)
    final = [kept, final_states(pruned, sequences, work / "pruned", device, batch_tokens, progress)]
    heads = [Decoder(checkpoint, device).head() for checkpoint in (original, pruned)]
    values = []
    for tokens, start in zip(sequences.tokens, sequences.offsets, strict=True):
        ids = torch.from_numpy(np.ascontiguousarray(tokens)).to(device)
        parts = []
        for begin in range(0, len(ids) - 1, LOGIT_TOKENS):
            count = min(LOGIT_TOKENS, len(ids) - 1 - begin)
            logs = [
                torch.log_softmax(head(s.read(start + begin, count).to(device)), dim=-1)
                for head, s in zip(heads, final, strict=True)
            ]
            for checkpoint, found in zip((original, pruned), logs, strict=True):
                require_numbers(checkpoint, found)
            parts.append(_chunk(logs[0], logs[1], ids[begin + 1 : begin + 1 + count]))
        values.append(np.concatenate(parts))
    progress.advance()
    for states in final if reference is None else final[1:]:
        states.remove()
    return values


def final_states(
    checkpoint: Checkpoint,
    sequences: Sequences,
    stem: Path,
    device: torch.device,
    batch_tokens: int,
    progress: Progress,
    arranged: Arranged = lambda _batch: (None, None),
) -> States:
    """The last layer's output for every token; rows are texts unless ``arranged`` otherwise."""
    decoder = Decoder(checkpoint, device)
    hidden = checkpoint.shape.hidden
    states = [States(stem.with_suffix(f".{i}.f32"), hidden) for i in (0, 1)]
    embed(decoder, sequences, states[0])
    for index in range(decoder.layers):
        layer = decoder.layer(index)
        before, after = states[index % 2], states[(index + 1) % 2]
        for batch in batches(sequences, batch_tokens, device):
            places_BL, mask_B1LL = arranged(batch)
            rotary = decoder.rotary(*batch.shape, places_BL)
            r_BLD = layer.attend(batch.load(before), rotary, mask_B1LL)
            batch.store(after, r_BLD + layer.feed_forward(layer.normed(r_BLD)))
        progress.advance()
    states[(decoder.layers + 1) % 2].remove()
    return states[decoder.layers % 2]


def _chunk(a_TV: torch.Tensor, b_TV: torch.Tensor, next_T: torch.Tensor) -> Floats:
    rows = torch.arange(len(next_T), device=next_T.device)
    values = (
        (a_TV.exp() * (a_TV - b_TV)).sum(dim=-1),
        a_TV.argmax(dim=-1) == b_TV.argmax(dim=-1),
        -a_TV[rows, next_T],
        -b_TV[rows, next_T],
    )
    return np.stack([value.double().cpu().numpy() for value in values], axis=1)


def require_numbers(checkpoint: Checkpoint, logs_TV: torch.Tensor) -> None:
    """Refuse a model whose weights or sums have overflowed: every comparison with NaN is false.

    Raises:
        CheckpointError: a log-probability is no number.
    """
    if not all_finite(logs_TV):
        raise CheckpointError(
            "expects something that is no number",
            where=str(checkpoint.path),
            remedy="moe-serve verify names tensors that hold NaN or infinity",
        )
