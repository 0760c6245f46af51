"""Real clients against the endpoint: timing one request at a time, and a steady load."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

from openai import OpenAI, OpenAIError

from moe_serve.serving.variants import HEADER


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Medians over requests, one at a time."""

    tokens_per_second: float
    """Generated tokens over the time from sending the request to the last of them."""
    ttft_seconds: float
    """From sending the request to its first token."""
    itl_seconds: float
    """Time between tokens, without the first."""


def client(endpoint: str, variant: str | None = None) -> OpenAI:
    """A stock OpenAI client; ``variant`` pins who must answer."""
    headers = {HEADER: variant} if variant else None
    return OpenAI(
        base_url=endpoint, api_key="none", max_retries=0, timeout=120, default_headers=headers
    )


def ask_everything(endpoint: str, model: str, variant: str) -> list[str]:
    """Chat and completion, whole and streamed; returns what was asked, raises if one failed.

    Raises:
        OpenAIError: a request failed.
    """
    with client(endpoint, variant) as openai:
        openai.completions.create(model=model, prompt="import ", max_tokens=16)
        list(openai.completions.create(model=model, prompt="import ", max_tokens=16, stream=True))
        messages: list[Any] = [{"role": "user", "content": "SELECT"}]
        openai.chat.completions.create(model=model, messages=messages, max_tokens=16)
        list(
            openai.chat.completions.create(
                model=model, messages=messages, max_tokens=16, stream=True
            )
        )
    return ["completion", "streamed completion", "chat", "streamed chat"]


def time_requests(endpoint: str, model: str, variant: str, *, requests: int, tokens: int) -> Timing:
    """Time streamed completions, one after the other."""
    first, between, rate = [], [], []
    with client(endpoint, variant) as openai:
        for number in range(requests + 1):
            began = time.perf_counter()
            arrivals = []
            stream = openai.completions.create(
                model=model,
                prompt=f"{number} def ",
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            arrivals = [time.perf_counter() for _ in stream]
            if number == 0:
                continue  # Warm-up.
            first.append(arrivals[0] - began)
            between.append((arrivals[-1] - arrivals[0]) / (tokens - 1))
            rate.append(tokens / (arrivals[-1] - began))
    return Timing(
        tokens_per_second=median(rate), ttft_seconds=median(first), itl_seconds=median(between)
    )


@dataclass(kw_only=True)
class Load:
    """Streams in flight from several threads until stopped."""

    endpoint: str
    model: str
    streams: int = 4
    tokens: int = 24
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(phase, variant or error) → requests."""
    phase: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        """Begin."""
        self._threads = [threading.Thread(target=self._run) for _ in range(self.streams)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """End, after the streams in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> int:
        """Requests that did not end well."""
        return sum(n for (_, who), n in self.outcomes.items() if who.startswith("failed"))

    @property
    def total(self) -> int:
        """All requests that ended."""
        return sum(self.outcomes.values())

    def _run(self) -> None:
        with client(self.endpoint) as openai:
            while not self._stop.is_set():
                phase = self.phase
                outcome = self._one(openai)
                with self._lock:
                    self.outcomes[phase, outcome] += 1

    def _one(self, openai: OpenAI) -> str:
        """Who answered, or how it failed; a stream without its end counts as failed."""
        try:
            response = openai.completions.with_raw_response.create(
                model=self.model,
                prompt="for i in ",
                max_tokens=self.tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            reasons = [c.choices[0].finish_reason for c in response.parse() if c.choices]
        except OpenAIError as exc:
            return f"failed: {type(exc).__name__}"
        if not reasons or reasons[-1] != "length":
            return "failed: cut off"
        return str(response.headers.get(HEADER))
