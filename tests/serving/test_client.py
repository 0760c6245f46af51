"""Servers that are no engine, or one that says too little: which, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moe_serve.errors import ServingError
from moe_serve.serving.client import ServedModel
from moe_serve.serving.ports import free_port
from tests.support.threaded import Threaded

PATHS = ("/v1/models", "/tokenize", "/v1/completions")


@contextmanager
def server(answers: dict[str, Any]) -> Iterator[ServedModel]:
    """A real one that gives these answers, and nothing where none is named."""

    async def answer(request: Request) -> Response:
        found = answers.get(request.url.path)
        if isinstance(found, Response):
            return found
        return JSONResponse(found)

    port = free_port()
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in PATHS]
    with Threaded(routes, port), httpx.Client(timeout=10) as client:
        url = f"http://127.0.0.1:{port}"
        yield ServedModel(url=url, model="m", length=None, client=client)


def place(*tokens: int) -> dict[str, Any]:
    """What an engine expects at one place, the first token likeliest."""
    return {str(t): {"logprob": -1.0 - n, "rank": n + 1} for n, t in enumerate(tokens)}


@pytest.mark.parametrize(
    ("answer", "ask", "words"),
    [
        ({"tokens": None}, lambda m: m.tokenize("x"), "/tokenize gives no tokens"),
        ({"choices": []}, lambda m: m.text("x", 1, []), "answers without a choice"),
        ({"choices": [{}]}, lambda m: m.text("x", 1, []), "answers without a text"),
        ({"choices": [{"text": "y"}]}, lambda m: m.go_on("x", 1), "gives no token_ids"),
        ({"choices": [{}]}, lambda m: m.expect([1, 2], 1), "gives no prompt_logprobs"),
        (
            {"choices": [{"prompt_logprobs": [None, place(3)]}]},
            lambda m: m.expect([1, 2], 1),
            "prompt_logprobs lack a number for a token",
        ),
        (
            {"choices": [{"prompt_logprobs": [None]}]},
            lambda m: m.expect([1, 2], 1),
            "prompt_logprobs lack a number for a token",
        ),
        (
            {"choices": [{"prompt_logprobs": [None, place(2)]}]},
            lambda m: m.expect([1, 2], 3),
            "list fewer than the 3 tokens asked for; ask for fewer",
        ),
        (PlainTextResponse("<html>"), lambda m: m.tokenize("x"), "something else than JSON"),
        (
            PlainTextResponse("a prompt, repeated", status_code=400),
            lambda m: m.tokenize("x"),
            "answers with status 400; the engine's log says why",
        ),
    ],
)
def test_an_answer_that_says_too_little_is_refused(
    answer: Any, ask: Callable[[ServedModel], Any], words: str
) -> None:
    """Named by its address, and without a word of the text that was asked about."""
    with server({"/tokenize": answer, "/v1/completions": answer}) as model:
        with pytest.raises(ServingError, match=words) as error:
            ask(model)
        assert str(error.value).startswith(model.url)
        assert "repeated" not in str(error.value)


def test_an_engine_is_found_by_either_address() -> None:
    """With /v1 or without; one that lists no model is none."""
    listed = {"data": [{"id": "name", "max_model_len": 77}]}
    with server({"/v1/models": listed}) as model:
        for url in (model.url, f"{model.url}/v1/"):
            found = ServedModel.at(url, model.client)
            assert (found.url, found.model, found.length) == (model.url, "name", 77)
    with (
        server({"/v1/models": {"data": []}}) as model,
        pytest.raises(ServingError, match="lists no model; give the address of a vLLM engine"),
    ):
        ServedModel.at(model.url, model.client)


def test_nobody_there_is_said() -> None:
    """A port that nothing listens on, and what is no address."""
    with httpx.Client(timeout=5) as client:
        with pytest.raises(ServingError, match=r"no answer \(ConnectError\); see that the engine"):
            ServedModel.at(f"http://127.0.0.1:{free_port()}", client)
        with pytest.raises(ServingError, match="no answer"):
            ServedModel.at("http://[", client)
