"""How each kind of request is told to have ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.serving.kinds import KINDS, outcome
from moe_serve.serving.ports import free_port
from tests.support.threaded import Threaded


async def answer(request: Request) -> Response:
    """As an engine does: streamed, slow where 400 tokens are asked for, or refused."""
    try:
        body = await request.json()
    except ValueError:
        body = {}
    if not body.get("max_tokens") or body["max_tokens"] < 0 or body["model"] != "soak":
        return JSONResponse({"error": {"type": "BadRequestError", "message": "no"}}, 400)
    if body.get("stream"):

        async def events() -> AsyncIterator[bytes]:
            for _ in range(body["max_tokens"]):
                yield b'data: {"choices": []}\n\n'
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events())
    await asyncio.sleep(0.4 if body["max_tokens"] == 400 else 0)
    choice = {"text": "said", "message": {"content": "said"}, "finish_reason": "length"}
    return JSONResponse({"choices": [choice] * body.get("n", 1)})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where it answers."""
    paths = ("/v1/completions", "/v1/chat/completions")
    with Threaded([Route(path, answer, methods=["POST"]) for path in paths], free_port()) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_ends_as_it_should(kind: str, url: str) -> None:
    """And what is said is kept where two engines should say the same."""
    expected = {
        **dict.fromkeys(("short", "long", "chat"), ("200 length", "said")),
        "sampled": ("200 length length", None),
        "streamed": ("200 done", None),
        "cancelled": ("200 hung up", None),
        "abandoned": ("left, or 200 in time", None),
    }
    with httpx.Client(timeout=10) as client:
        for seed in range(12):
            ended = outcome(client, url, kind, seed)
            if kind in expected:
                assert ended == expected[kind]
            else:
                # The stand-in looks at less than an engine: what it lets through is 200.
                assert ended.how in ("400 BadRequestError", "200 length", "200 ")
                assert ended.said is not None


def test_who_does_not_answer_is_an_outcome_too() -> None:
    """Nothing listens there."""
    with httpx.Client(timeout=1) as client:
        assert outcome(client, "http://127.0.0.1:1", "short", 0).how == "ConnectError"
