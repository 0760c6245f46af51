"""A small real HTTP server that streams like an engine, for tests of the proxy itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.threaded import Threaded


class Upstream(Threaded):
    """Serves ``/health``, ``/v1/models`` and streamed completions on a loopback port."""

    def __init__(self, name: str, port: int, *, chunks: int = 20, pause: float = 0.05) -> None:
        """Name it; each completion streams ``chunks`` events, ``pause`` seconds apart."""
        self.name = name
        self.started = 0
        self.fail_every = 0
        """Each such request is answered 500; 0: none."""
        self.slow_every = 0
        """Each such request is counted as slower than any objective; 0: none."""
        self.truncated_every = 1
        """Each such answer ends at its length; 0: none."""
        self.unlike = 0.0
        """Nats by which its log-probabilities are off; with any its likeliest token is another."""
        self.asked: list[dict[str, object]] = []
        """Bodies of the requests that asked for ``prompt_logprobs``."""
        self.prompts: list[list[int]] = []
        """Token ids that streamed answers were asked for."""
        self._finished, self._slow, self._cut, self._short = 0, 0, 0, 0
        self._failed = 0
        self._healthy = False
        self.refuses_to_wake = False
        self.turning: Callable[[str], None] = lambda _to: None
        """Called with ``sleep`` or ``wake_up`` when told to, before it does."""
        self.told: list[str] = []
        """Paths and queries of what it was told about sleep."""
        self.running = 1
        """Requests in flight, as its metrics have it."""
        self.headers: dict[str, str] = {}
        """Of the last completion asked for."""
        self._open, self._awake = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._awake.set()
        self._chunks, self._pause = chunks, pause
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/secret", self._health),
            Route("/metrics", self._metrics),
            Route("/is_sleeping", self._is_sleeping),
            Route("/sleep", self._sleep, methods=["POST"]),
            Route("/wake_up", self._wake_up, methods=["POST"]),
        ]
        super().__init__(routes, port)

    def stop(self) -> None:
        """Close the port at once, dropping what is in flight."""
        self._server.force_exit = True
        super().stop()

    def die(self) -> None:
        """Reset all connections and close the port, as a process that is killed does."""
        self._loop.call_soon_threadsafe(self._reset)
        self.stop()

    def _reset(self) -> None:
        # The port first, or what is tried again arrives here once more and is answered 500.
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def hang(self, *, healthy: bool = False) -> None:
        """Take requests from now on, and answer none but, while ``healthy``, for its health."""
        self._healthy = healthy
        self._open.clear()

    async def _health(self, _request: Request) -> Response:
        if not self._healthy:
            await self._open.wait()
        return PlainTextResponse("ok")

    @property
    def sleeping(self) -> bool:
        """As vLLM in its sleep mode: what is asked for waits until it wakes."""
        return not self._awake.is_set()

    async def _is_sleeping(self, _request: Request) -> Response:
        return JSONResponse({"is_sleeping": self.sleeping})

    async def _sleep(self, request: Request) -> Response:
        self.told.append(f"sleep?{request.url.query}")
        await asyncio.to_thread(self.turning, "sleep")
        self._awake.clear()
        return JSONResponse({"status": "sleeping"})

    async def _wake_up(self, _request: Request) -> Response:
        self.told.append("wake_up")
        if self.refuses_to_wake:
            return PlainTextResponse("out of memory", status_code=500)
        await asyncio.to_thread(self.turning, "wake_up")
        self._awake.set()
        return JSONResponse({"status": "awake"})

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _tokenize(self, request: Request) -> Response:
        """Token 1 for a letter of even code, 2 for another."""
        text = json.loads(await request.body())["prompt"]
        return JSONResponse({"tokens": [1 + ord(letter) % 2 for letter in text]})

    async def _metrics(self, _request: Request) -> Response:
        """As an engine has them: histograms, counters and gauges."""
        await self._open.wait()
        lines = [f"vllm:num_requests_running {self.running}", "vllm:num_requests_waiting 0"]
        lines += ["vllm:kv_cache_usage_perc 0.1"]
        lines += [f"vllm:{k}_tokens_total {self._finished}" for k in ("prompt", "generation")]
        lines += ['vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1']
        counted = {"2xx": self._finished, "5xx": self._failed}
        http = 'http_requests_total{handler="/v1/completions",method="POST",status'
        lines += [f'{http}="{status}"}} {number}' for status, number in counted.items()]
        edges = {"time_to_first_token": 1.0, "request_time_per_output_token": 0.1}
        for name, edge in {**edges, "inter_token_latency": 0.1}.items():
            lines.append(f"# TYPE vllm:{name}_seconds histogram")
            counts = {f"{edge}": self._finished - self._slow, "+Inf": self._finished}
            lines += [f'vllm:{name}_seconds_bucket{{le="{e}"}} {n}' for e, n in counts.items()]
            lines += [f"vllm:{name}_seconds_count {self._finished}", f"vllm:{name}_seconds_sum 1"]
        lines.append("# TYPE vllm:request_success counter")
        ends = {"length": self._cut, "stop": self._finished - self._cut, "abort": 7}
        ended = "vllm:request_success_total"
        lines += [f'{ended}{{finished_reason="{r}"}} {n}' for r, n in ends.items()]
        lines.append("# TYPE vllm:request_generation_tokens histogram")
        tokens = {"1.0": self._short, "10.0": self._finished, "+Inf": self._finished}
        bucket = "vllm:request_generation_tokens_bucket"
        lines += [f'{bucket}{{le="{edge}"}} {number}' for edge, number in tokens.items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    def _probed(self, asked: dict[str, object]) -> Response:
        """Two tokens at each of three places, the likelier one first."""
        self.asked.append(asked)
        self._cut += 1
        self._short += 1
        likely, other = (1, 2) if not self.unlike else (2, 1)
        high, low = -0.1 - self.unlike, -3.0 - self.unlike
        place = {str(likely): {"logprob": high, "rank": 1}, str(other): {"logprob": low, "rank": 2}}
        prompt = asked.get("prompt")
        count = len(prompt) - 1 if isinstance(prompt, list) else 2
        places = [None, *[place] * count]
        choice = {"text": "a", "finish_reason": "length", "prompt_logprobs": places}
        return JSONResponse({"choices": [choice]})

    def _answered(self) -> Response:
        """Five tokens; where it is unlike, a longer loop from the third on."""
        ids = [1, 2, 3, 4, 5] if not self.unlike else [1, 2, *[9] * 30]
        text = "a b c d" if not self.unlike else "a b" + "z" * 30
        choice = {"text": text, "finish_reason": "stop", "token_ids": ids}
        return JSONResponse({"choices": [choice]})

    async def _completions(self, request: Request) -> Response:
        raw = await request.body()
        self._loop = asyncio.get_running_loop()
        self.headers = dict(request.headers)
        self.started += 1
        await self._open.wait()
        await self._awake.wait()
        if self.fail_every and self.started % self.fail_every == 0:
            self._failed += 1
            return PlainTextResponse("no", status_code=500)
        self._finished += 1
        asked = json.loads(raw) if raw else {}
        if "prompt_logprobs" in asked:
            return self._probed(asked)
        if asked.get("return_token_ids"):
            return self._answered()
        if isinstance(prompt := asked.get("prompt"), list):
            self.prompts.append(prompt)
        whole = not self.truncated_every or self._finished % self.truncated_every != 0
        end = "stop" if whole else "length"
        self._cut += not whole
        if self.slow_every and self._finished % self.slow_every == 0:
            self._slow += 1

        async def events() -> object:
            for number in range(self._chunks):
                reason = end if number == self._chunks - 1 else None
                choice = {
                    "index": 0,
                    "text": "abcdefghijklmnop"[number % 16],
                    "finish_reason": reason,
                    "logprobs": None,
                }
                chunk = {
                    "id": "1",
                    "object": "text_completion",
                    "created": 0,
                    "model": self.name,
                    "choices": [choice],
                }
                yield f"data: {json.dumps(chunk)}\n\n"
                await asyncio.sleep(self._pause)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")  # type: ignore[arg-type]
