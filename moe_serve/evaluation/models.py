"""What a comparison asks of a model, wherever it is: a checkpoint's directory or an engine's URL.

Both answer the same question, what they expect at each place of a row of token ids, so that
either can stand on either side.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import numpy as np
import torch

from moe_serve.calibration.decoder import Decoder, OutputHead
from moe_serve.calibration.sequences import Sequences, tokenizer
from moe_serve.calibration.states import States
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.evaluation.divergence import final_states
from moe_serve.progress import Progress
from moe_serve.serving.client import ServedModel
from moe_serve.serving.logprobs import Place

_STRIDE: Final = 32
"""Rows are filled up to a multiple of this: rows of equal length go through a layer together."""
PATIENCE: Final = 300.0
"""Seconds for one answer of an engine."""


class Model(Protocol):
    """One side of a comparison."""

    @property
    def name(self) -> str:
        """Its directory or URL."""

    @property
    def length(self) -> int | None:
        """Tokens of the longest row that it can be asked about; ``None``: it doesn't say."""

    @property
    def end(self) -> int | None:
        """Its end-of-text token, where it says so."""

    @property
    def steps(self) -> int:
        """How often it advances the progress for one call of :meth:`expect`."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids without special tokens."""

    def expect(
        self, rows: Sequence[Sequence[int]], top: int, progress: Progress
    ) -> Generator[tuple[Place, ...], None, None]:
        """For each row, in order, what it expects at each place but the first."""

    def go_on(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """Greedy continuation, up to where one of ``until`` would begin."""


def is_url(name: str) -> bool:
    """Whether it names an engine; anything else is a directory."""
    return name.startswith(("http://", "https://"))


@contextmanager
def opened(name: str, device: torch.device, batch_tokens: int, concurrency: int) -> Iterator[Model]:
    """A model by its directory or URL.

    Raises:
        CheckpointError: the directory holds none.
        ServingError: no engine answers there.
    """
    if not is_url(name):
        yield StoredModel.at(Path(name), device, batch_tokens)
        return
    with httpx.Client(
        timeout=PATIENCE, limits=httpx.Limits(max_connections=2 * concurrency)
    ) as client:
        yield Engine(served=ServedModel.at(name, client), concurrency=concurrency)


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
        """All rows go through a layer before the next is read; their states lie on disk."""
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        sequences = Sequences(
            domains=("rows",),
            tokens=tuple(self._filled(rows[n]) for n in order),
            domain=(0,) * len(rows),
        )
        starts = dict(zip(order, sequences.offsets, strict=True))
        with tempfile.TemporaryDirectory(prefix="moe-serve-compare-") as work:
            states, head = self._computed(sequences, Path(work), progress)
            for number, ids in enumerate(rows):
                yield self._places(head, states, starts[number], ids, top)

    def _filled(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The row and some tokens that nobody looks at: attention looks back only."""
        length = min(-(-len(ids) // _STRIDE) * _STRIDE, self.length or len(ids))
        filled = np.zeros(max(length, len(ids)), dtype=np.int64)
        filled[: len(ids)] = ids
        return filled

    @torch.inference_mode()
    def _computed(
        self, sequences: Sequences, work: Path, progress: Progress
    ) -> tuple[States, OutputHead]:
        states = final_states(
            self.checkpoint, sequences, work / "rows", self.device, self.batch_tokens, progress
        )
        return states, Decoder(self.checkpoint, self.device).head()

    @torch.inference_mode()
    def _places(
        self, head: OutputHead, states: States, start: int, ids: Sequence[int], top: int
    ) -> tuple[Place, ...]:
        x_TD = states.read(start, len(ids) - 1).to(self.device)
        logs_TV = torch.log_softmax(head(x_TD), dim=-1)
        values, tokens = logs_TV.topk(min(top, logs_TV.shape[1]), dim=-1)
        next_T = torch.tensor(ids[1:], device=self.device)
        stood = logs_TV.gather(1, next_T[:, None])[:, 0].tolist()
        return tuple(
            Place({**dict(zip(found, logs, strict=True)), token: own}, logs[-1], found[0])
            for found, logs, token, own in zip(
                tokens.tolist(), values.tolist(), ids[1:], stood, strict=True
            )
        )

    def go_on(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """Refused: token by token, every layer would be read again each time."""
        del prompt, tokens, until
        raise UsageError(
            "is a directory, and this task lets the model write",
            where=self.name,
            remedy="serve it and give its URL",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A model that an engine serves."""

    served: ServedModel
    concurrency: int
    end: int | None = None
    steps: int = 0

    @property
    def name(self) -> str:
        """Its URL."""
        return self.served.url

    @property
    def length(self) -> int | None:
        """One token is generated: the engine refuses a prompt that fills its context."""
        return self.served.length - 1 if self.served.length else None

    def tokenize(self, text: str) -> list[int]:
        """By the engine."""
        return self.served.tokenize(text)

    def expect(
        self, rows: Sequence[Sequence[int]], top: int, progress: Progress
    ) -> Generator[tuple[Place, ...], None, None]:
        """Several rows at once, answers in order; few are held."""
        del progress
        pending: deque[Future[tuple[Place, ...]]] = deque()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for ids in rows:
                    pending.append(pool.submit(self.served.expect, ids, top))
                    if len(pending) > 2 * self.concurrency:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for task in pending:
                    task.cancel()

    def go_on(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """As the engine generates it."""
        return self.served.text(prompt, tokens, until)
