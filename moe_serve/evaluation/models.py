"""What a comparison asks of a model, wherever it is: a checkpoint's directory or an engine's URL.

Both answer the same question, what they expect at each place of a row of token ids, so that
either can stand on either side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import httpx
import torch

from moe_serve.evaluation.forks import Fork
from moe_serve.evaluation.stored import StoredModel
from moe_serve.progress import Progress
from moe_serve.serving.client import ServedModel
from moe_serve.serving.logprobs import Place

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
        """How often it advances the progress for one call of :meth:`expect` or :meth:`follow`."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids without special tokens."""

    def expect(
        self, rows: Sequence[Sequence[int]], top: int, progress: Progress
    ) -> Generator[tuple[Place, ...], None, None]:
        """For each row, in order, what it expects at each place but the first."""

    def follow(
        self, forks: Sequence[Fork], top: int, progress: Progress
    ) -> Generator[tuple[tuple[Place, ...], ...], None, None]:
        """For each context, in order, what it expects at each place of its continuations."""

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

    def follow(
        self, forks: Sequence[Fork], top: int, progress: Progress
    ) -> Generator[tuple[tuple[Place, ...], ...], None, None]:
        """Each continuation in a request of its own, its context computed again.

        vLLM takes nothing from its prefix cache for a request with ``prompt_logprobs``.
        """
        rows = [(*fork.context, *ids) for fork in forks for ids in fork.continuations]
        with closing(self.expect(rows, top, progress)) as every:
            for fork in forks:
                # Continuations first: where they end, no answer more is taken.
                yield tuple(
                    places[len(places) - len(ids) :]
                    for ids, places in zip(fork.continuations, every, strict=False)
                )

    def go_on(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """As the engine generates it."""
        return self.served.text(prompt, tokens, until)
