"""An engine's API over a checkpoint that is computed here: what vLLM would answer, without vLLM."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moe_serve.evaluation.stored import StoredModel
from moe_serve.progress import SILENT
from moe_serve.serving.ports import free_port
from tests.support.threaded import Threaded


class Computed(Threaded):
    """Models, tokens, and completions with ``prompt_logprobs`` or ``echo``."""

    def __init__(self, path: Path) -> None:
        """Of a directory, on a free port."""
        self._model = StoredModel.at(path, torch.device("cpu"), 4096)
        self._one = threading.Lock()
        routes = [
            Route("/v1/models", self._models),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        super().__init__(routes, free_port())
        self.url = f"http://127.0.0.1:{self.port}"

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m", "max_model_len": self._model.length}]})

    async def _tokenize(self, request: Request) -> Response:
        text = json.loads(await request.body())["prompt"]
        return JSONResponse({"tokens": self._model.tokenize(text)})

    async def _completions(self, request: Request) -> Response:
        asked = json.loads(await request.body())
        if "prompt_logprobs" in asked:
            places = self._expected(asked["prompt"], asked["prompt_logprobs"])
            return JSONResponse({"choices": [{"text": "", "prompt_logprobs": [None, *places]}]})
        if asked.get("echo"):
            prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
            choices = [self._echoed(n, ids) for n, ids in enumerate(prompts)]
            return JSONResponse({"choices": choices})
        stop = asked["stop"][0]
        return JSONResponse({"choices": [{"text": f"42, not {stop}".partition(stop)[0]}]})

    def _expected(self, ids: list[int], top: int) -> list[dict[str, Any]]:
        """In vLLM's shape: token → log-probability, also of the token that stands there."""
        with self._one:
            (places,) = self._model.expect([ids], top, SILENT)
        return [{str(t): {"logprob": v} for t, v in place.listed.items()} for place in places]

    def _echoed(self, number: int, ids: list[int]) -> dict[str, Any]:
        """The legacy completions API: ``logprobs`` of the prompt, and of one token more."""
        found = self._expected(ids, 1)
        own = [place[str(token)]["logprob"] for place, token in zip(found, ids[1:], strict=True)]
        best = [max(v["logprob"] for v in place.values()) for place in found]
        tops = [{str(n): value} for n, value in enumerate(best)]
        logs = {
            "token_logprobs": [None, *own, 0.0],
            "top_logprobs": [None, *tops, {"x": 0.0}],
            "tokens": [str(token) for token in [*ids, 0]],
        }
        return {"index": number, "text": "", "logprobs": logs}
