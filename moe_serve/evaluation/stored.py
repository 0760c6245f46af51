"""A checkpoint's directory as a side of a comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from moe_serve.calibration.decoder import Decoder, OutputHead
from moe_serve.calibration.sequences import Sequences, tokenizer
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import require_space
from moe_serve.errors import UsageError
from moe_serve.evaluation.divergence import LOGIT_TOKENS, final_states, require_numbers
from moe_serve.evaluation.forks import Fork, Tokens, visible
from moe_serve.progress import Progress
from moe_serve.serving.logprobs import Place

_STRIDE: Final = 32
"""Rows are filled up to a multiple of this: rows of equal length go through a layer together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """A checkpoint, computed here one layer at a time."""

    checkpoint: Checkpoint
    encode: Callable[[str], list[int]]
    end: int | None
    device: torch.device
    batch_tokens: int

    @classmethod
    def at(cls, path: Path, device: torch.device, batch_tokens: int) -> StoredModel:
        """Open it with its tokenizer."""
        checkpoint = open_checkpoint(path)
        encode, end = tokenizer(path)
        return cls(
            checkpoint=checkpoint, encode=encode, end=end, device=device, batch_tokens=batch_tokens
        )

    @property
    def name(self) -> str:
        """Its directory."""
        return str(self.checkpoint.path)

    @property
    def length(self) -> int | None:
        """Of its context."""
        return self.checkpoint.family.longest(self.checkpoint.config)

    @property
    def steps(self) -> int:
        """One for each layer."""
        return self.checkpoint.shape.layers

    def tokenize(self, text: str) -> list[int]:
        """By the tokenizer in its directory."""
        return self.encode(text)

    def expect(
        self, rows: Sequence[Sequence[int]], top: int, progress: Progress
    ) -> Generator[tuple[Place, ...], None, None]:
        """A row is a context of one token and what follows it."""
        forks = [Fork(context=(ids[0],), continuations=(tuple(ids[1:]),)) for ids in rows]
        for (places,) in self.follow(forks, top, progress):
            yield places

    def follow(
        self, forks: Sequence[Fork], top: int, progress: Progress
    ) -> Generator[tuple[tuple[Place, ...], ...], None, None]:
        """All forks go through a layer before the next is read; their states lie on disk."""
        parts = [part for fork in forks for part in fork.parts()]
        order = sorted(range(len(parts)), key=lambda n: parts[n].length)
        rows = [parts[n].row(self._filled(parts[n])) for n in order]
        sequences = Sequences(
            domains=("rows",), tokens=tuple(ids for ids, _, _ in rows), domain=(0,) * len(rows)
        )
        starts = dict(zip(order, sequences.offsets, strict=True))
        numbers = iter(range(len(parts)))
        with tempfile.TemporaryDirectory(prefix="moe-serve-compare-") as work:
            require_space(
                Path(work),
                2 * sequences.total * self.checkpoint.shape.hidden * 4,
                remedy="set TMPDIR to a folder on a larger disk, or ask for fewer items",
            )
            plain = [parts[n].plain for n in order]
            states, head = self._computed(sequences, rows, plain, Path(work), progress)
            for fork in forks:
                found: list[tuple[Place, ...]] = []
                while len(found) < len(fork.continuations):
                    number = next(numbers)
                    found += self._places(head, states, starts[number], parts[number], top)
                yield tuple(found)

    def _filled(self, part: Fork) -> int:
        """The row's length, up to where some rows are alike."""
        length = -(-part.length // _STRIDE) * _STRIDE
        # What fills up a plain row stands where the context may have ended.
        return max(part.length, min(length, self.length or length)) if part.plain else length

    @torch.inference_mode()
    def _computed(
        self,
        sequences: Sequences,
        rows: Sequence[tuple[Tokens, Tokens, Tokens]],
        plain: Sequence[bool],
        work: Path,
        progress: Progress,
    ) -> tuple[States, OutputHead]:
        def arranged(batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            """Places in the texts and what attention sees; nothing where that is as ever."""
            if all(plain[n] for n in batch.sequences):
                return None, None
            places_BL, branch_BL = (
                torch.stack([torch.from_numpy(rows[n][part]) for n in batch.sequences])
                for part in (1, 2)
            )
            return places_BL.to(self.device), visible(branch_BL.to(self.device))

        states = final_states(
            self.checkpoint,
            sequences,
            work / "rows",
            self.device,
            self.batch_tokens,
            progress,
            arranged,
        )
        return states, Decoder(self.checkpoint, self.device).head()

    @torch.inference_mode()
    def _places(
        self, head: OutputHead, states: States, start: int, part: Fork, top: int
    ) -> list[tuple[Place, ...]]:
        first = len(part.context) - 1
        x_TD = states.read(start + first, part.length - first).to(self.device)
        asked = [
            (i, at)
            for c, o in zip(part.continuations, part.outputs(), strict=True)
            for i, at in zip(c, o, strict=True)
        ]
        every: list[Place] = []
        for begin in range(0, len(asked), LOGIT_TOKENS):
            ids, outputs = zip(*asked[begin : begin + LOGIT_TOKENS], strict=True)
            at_T = torch.tensor(outputs, device=self.device) - first
            logs_TV = torch.log_softmax(head(x_TD[at_T]), dim=-1)
            require_numbers(self.checkpoint, logs_TV)
            every += _listed(logs_TV, ids, top)
        rest = iter(every)
        return [tuple(islice(rest, len(ids))) for ids in part.continuations]

    def go_on(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """Refused: token by token, every layer would be read again each time."""
        del prompt, tokens, until
        raise UsageError(
            "is a directory, and this task lets the model write",
            where=self.name,
            remedy="serve it and give its URL",
        )


def _listed(logs_TV: torch.Tensor, ids: Sequence[int], top: int) -> tuple[Place, ...]:
    values, tokens = logs_TV.topk(min(top, logs_TV.shape[1]), dim=-1)
    next_T = torch.tensor(ids, device=logs_TV.device)
    stood = logs_TV.gather(1, next_T[:, None])[:, 0].tolist()
    return tuple(
        Place({**dict(zip(found, logs, strict=True)), token: own}, logs[-1], found[0])
        for found, logs, token, own in zip(
            tokens.tolist(), values.tolist(), ids, stood, strict=True
        )
    )
