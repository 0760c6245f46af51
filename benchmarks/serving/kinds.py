"""Kinds of request to an engine, and how each ended."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import httpx

SERVED: Final = "soak"
LENGTH: Final = 512
"""Tokens of the engine's context."""
_HURRY: Final = 0.2
"""Seconds after which an impatient client leaves; 400 tokens take longer."""
_COMPLETIONS: Final = "/v1/completions"
_CHAT: Final = "/v1/chat/completions"


class Ended(NamedTuple):
    """How a request ended."""

    how: str
    said: str | None = None
    """The answer or the error's words, where two engines should say the same."""


Send = Callable[[httpx.Client, str, random.Random], Ended]
Body = dict[str, Any]


def outcome(client: httpx.Client, url: str, kind: str, seed: int) -> Ended:
    """Send one; the same seed asks the same."""
    try:
        return KINDS[kind](client, url, random.Random(seed))
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        return Ended(type(exc).__name__)


def post(client: httpx.Client, url: str, body: Body | bytes, path: str = _COMPLETIONS) -> Ended:
    """One that is not streamed."""
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    reply = client.post(url + path, headers={"content-type": "application/json"}, **sent)
    told = reply.json()
    if reply.status_code != 200:
        return Ended(f"{reply.status_code} {told['error']['type']}", told["error"]["message"])
    choices = told["choices"]
    said = "\n".join(str(c.get("text") or c.get("message", {}).get("content")) for c in choices)
    return Ended(f"200 {' '.join(c['finish_reason'] for c in choices)}", said)


def _stream(client: httpx.Client, url: str, body: Body, chunks: int | None) -> Ended:
    """Read ``chunks`` events, then hang up; all without a number."""
    seen = 0
    with client.stream("POST", url, json=body | {"stream": True}) as reply:
        for line in reply.iter_lines():
            seen += line.startswith("data: {")
            if line == "data: [DONE]":
                return Ended(f"{reply.status_code} done")
            if chunks is not None and seen >= chunks:
                return Ended(f"{reply.status_code} hung up")
        return Ended(f"{reply.status_code} cut")


def asked(rng: random.Random, prompt: int, generated: int) -> Body:
    """Random tokens, greedily continued."""
    return {
        "model": SERVED,
        "prompt": [rng.randrange(1, 4096) for _ in range(prompt)],
        "max_tokens": generated,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def _short(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    return post(client, url, asked(rng, rng.randint(1, 16), 8))


def _long(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    return post(client, url, asked(rng, rng.randint(200, 400), 64))


def _chat(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    words = " ".join(rng.choices(("which", "tree", "is", "old", "seven", "and"), k=9))
    body = {"model": SERVED, "messages": [{"role": "user", "content": words}]}
    return post(client, url, body | {"max_tokens": 16, "temperature": 0.0}, _CHAT)


def _sampled(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    more = {"temperature": 0.8, "top_p": 0.9, "n": 2, "seed": rng.randrange(99), "logprobs": 5}
    # What is drawn hangs on the last digits, which blocks round otherwise.
    how, _ = post(client, url, asked(rng, 32, 16) | more)
    return Ended(how)


def _streamed(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    return _stream(client, url + _COMPLETIONS, asked(rng, 32, 32), None)


def _cancelled(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    return _stream(client, url + _COMPLETIONS, asked(rng, 32, 200), rng.randint(1, 5))


_LEFT: Final = "left, or 200 in time"


def _abandoned(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    body = asked(rng, 32, 400)
    try:
        reply = client.post(url + _COMPLETIONS, json=body, timeout=httpx.Timeout(120, read=_HURRY))
    except httpx.ReadTimeout:
        return Ended(_LEFT)
    # Whether the answer is there before the client goes is a matter of the machine's load.
    return Ended(_LEFT if reply.status_code == httpx.codes.OK else f"{reply.status_code}")


def _malformed(client: httpx.Client, url: str, rng: random.Random) -> Ended:
    """One of the ways to get it wrong."""
    body = asked(rng, 4, 4)
    bodies: tuple[Body | bytes, ...] = (
        b"{",
        body | {"max_tokens": -1},
        body | {"model": "another"},
        body | {"prompt": [10**9]},
        asked(rng, LENGTH + 1, 4),
        body | {"temperature": "hot"},
        body | {"prompt": []},
        body | {"n": 0},
    )
    chats: tuple[Body, ...] = (
        {"model": SERVED},
        {"model": SERVED, "messages": [{"role": "user", "content": 7}]},
    )
    pairs = [*((_COMPLETIONS, b) for b in bodies), *((_CHAT, b) for b in chats)]
    path, chosen = rng.choice(pairs)
    return post(client, url, chosen, path)


KINDS: Final[dict[str, Send]] = {
    "short": _short,
    "long": _long,
    "chat": _chat,
    "sampled": _sampled,
    "streamed": _streamed,
    "cancelled": _cancelled,
    "abandoned": _abandoned,
    "malformed": _malformed,
}
