"""One probe put to one engine, and what two engines' answers say of each other.

Both engines read the same text and give, for every token of it, the log-probabilities of the
tokens they think likeliest at that place (``prompt_logprobs``, up to ``top`` of them). From these
lists follow, per place:

- a **lower bound of KL(original ‖ pruned)** in nats (:mod:`moe_serve.serving.logprobs`), clipped to
  [0, ``bound``].
- **top-1 disagreement**: whether the likeliest tokens differ.

A probe's values are the means over its places. A log-probability that is no number counts as the
worst there is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import httpx

from moe_serve.errors import RolloutError
from moe_serve.rollout.probes import Probe
from moe_serve.serving.garbage import Flaw, flaw
from moe_serve.serving.logprobs import Place, divergence

_LOW: Final = 1_000
"""vLLM's ``priority``: lower is earlier, users have 0."""
_PROMPT: Final = 0.6
"""Share of a probe's characters that are given for it to be gone on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """One engine's answer to one probe."""

    places: tuple[Place, ...]
    flaw: Flaw
    """Of the text it generated."""
    waits: tuple[float, float]
    """Seconds to the answer of the first request, and to the first token of the second."""
    pace: float
    """Seconds per token after the first, of the second request."""
    generated: int
    """Its tokens."""
    truncated: int
    """How many of the two requests ended at their limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one probe says of the pruned variant."""

    domain: str
    kl: float
    """Nats, mean over places; see the module's docstring."""
    disagreement: float
    """Share of the places."""
    flaws: tuple[Flaw, Flaw]
    """Of the original's and of the pruned variant's text."""

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        """Back from the store."""
        return cls(**{**value, "flaws": tuple(value["flaws"])})


class NoPriority(Exception):
    """The engine refuses a priority (0.32 ignores it where it has no use for one)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One to ask."""

    name: str
    url: str
    model: str
    """The name it serves under."""

    def ask(
        self, client: httpx.Client, probe: Probe, *, top: int, tokens: int, priority: bool
    ) -> Heard:
        """Two requests: log-probabilities of the text, then a greedy continuation of its beginning.

        Raises:
            NoPriority: asked with a priority that it doesn't know.
            RolloutError: it doesn't answer as it should; nothing of the text is in the message.
        """
        common: dict[str, Any] = {"model": self.model, "temperature": 0.0}
        if priority:
            common["priority"] = _LOW
        try:
            began = time.monotonic()
            answer = client.post(
                f"{self.url}/v1/completions",
                json={**common, "prompt": probe.text, "max_tokens": 1, "prompt_logprobs": top},
            )
            self._check(answer.status_code, answer.text)
            wait = time.monotonic() - began
            choice = answer.json()["choices"][0]
            places = tuple(Place.of(entry, top) for entry in choice["prompt_logprobs"] if entry)
            prompt = probe.text[: math.ceil(_PROMPT * len(probe.text))]
            body = {**common, "prompt": prompt, "max_tokens": tokens, "stream": True}
            text, arrivals, reason = self._generate(client, body)
        except httpx.HTTPError as exc:
            raise RolloutError(
                f"no answer to a probe ({type(exc).__name__})",
                where=self.name,
                remedy="see that the engine is well: its log, its /health",
            ) from exc
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            raise RolloutError(
                "an answer to a probe has not the form",
                where=self.name,
                remedy="its engine must be vLLM 0.32 or later",
            ) from exc
        if not places:
            raise RolloutError(
                "gives no prompt_logprobs",
                where=self.name,
                remedy="its engine must be vLLM 0.32 or later, and allow prompt_logprobs",
            )
        count = len(arrivals)
        return Heard(
            places=places,
            flaw=flaw(text, probe.text),
            waits=(wait, arrivals[0]),
            pace=(arrivals[-1] - arrivals[0]) / max(1, count - 1),
            generated=count,
            truncated=(choice["finish_reason"] == "length") + (reason == "length"),
        )

    def _check(self, status: int, text: str) -> None:
        if status == httpx.codes.BAD_REQUEST and "priorit" in text.lower():
            raise NoPriority
        if status != httpx.codes.OK:
            raise RolloutError(
                f"status {status} to a probe", where=self.name, remedy="the engine's log says why"
            )

    def _generate(
        self, client: httpx.Client, body: Mapping[str, Any]
    ) -> tuple[str, list[float], str | None]:
        """The text, when each of its tokens arrived, and why it ended."""
        pieces, arrivals, reason = [], [], None
        began = time.monotonic()
        with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                self._check(answer.status_code, answer.read().decode(errors="replace"))
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if not data or data == "[DONE]":
                    continue
                choice = json.loads(data)["choices"][0]
                arrivals.append(time.monotonic() - began)
                pieces.append(choice["text"])
                reason = choice["finish_reason"] or reason
        return "".join(pieces), arrivals, reason


def compare(domain: str, original: Heard, pruned: Heard, bound: float) -> Result:
    """What two answers to the same probe say.

    Raises:
        RolloutError: the engines did not read the same tokens.
    """
    if len(original.places) != len(pruned.places):
        raise RolloutError(
            f"one probe has {len(original.places)} tokens and {len(pruned.places)}",
            where="probes",
            remedy="both variants need the same tokenizer",
        )
    pairs = list(zip(original.places, pruned.places, strict=True))
    differ = [p.first != q.first or not q.sound for p, q in pairs]
    return Result(
        domain=domain,
        kl=math.fsum(divergence(p, q, bound) for p, q in pairs) / len(pairs),
        disagreement=sum(differ) / len(pairs),
        flaws=(original.flaw, pruned.flaw),
    )
