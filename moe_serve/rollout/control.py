"""The control process: ``/metrics``, a small API, the engines' own metrics.

``python -m moe_serve.rollout.control --state DIR --port P``; on loopback.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moe_serve.errors import MoeServeError
from moe_serve.families.kv import kv_bytes_per_token
from moe_serve.files import read_json
from moe_serve.metrics.exporter import Exporter, Watched
from moe_serve.metrics.sources import Endpoints, Source
from moe_serve.rollout import controller
from moe_serve.rollout.feedback import Votes, feedback_route
from moe_serve.rollout.quality import Quality
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import DECISIONS, move, status
from moe_serve.serving.routes import read_split
from moe_serve.serving.state import StackState

_MAX_BODY: Final = 10_000
_ACTOR: Final = "api"


def application(state: Path, votes: Votes | None = None) -> Starlette:
    """The ASGI application of one stack.

    Args:
        state: its directory.
        votes: where feedback is counted; the controller reads it.
    """
    stack, votes = StackState.load(state), votes or Votes()
    registry = CollectorRegistry()
    registry.register(exporter(state, stack, votes))

    async def metrics(_request: Request) -> Response:
        text = await run_in_threadpool(generate_latest, registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def engine_metrics(request: Request) -> Response:
        engine = stack.engines.get(request.path_params["variant"])
        if engine is None:
            return _problem(404, f"no engine {request.path_params['variant']!r}")
        try:
            async with httpx.AsyncClient(timeout=5.0) as client:
                answer = await client.get(f"{engine.url}/metrics")
        except httpx.HTTPError as exc:
            return _problem(502, f"the engine does not answer ({type(exc).__name__})")
        return Response(
            answer.content, answer.status_code, media_type=answer.headers.get("content-type")
        )

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok")

    async def get_status(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(status, state))

    async def history(_request: Request) -> Response:
        changes = await run_in_threadpool(Store(state).history)
        return JSONResponse({"changes": [c.to_json() for c in changes]})

    async def weight(request: Request) -> Response:
        body = await _body(request)
        percent = body.get("pruned_percent") if body is not None else None
        if isinstance(percent, bool) or not isinstance(percent, int | float):
            return _problem(422, 'send {"pruned_percent": 0 to 100}')
        moved = await run_in_threadpool(
            lambda: move(state, float(percent), decision="set", reason=_reason(body), actor=_ACTOR)
        )
        return JSONResponse(moved.to_json())

    async def rollback(request: Request) -> Response:
        body = await _body(request)
        moved = await run_in_threadpool(
            lambda: move(state, 0.0, decision="rollback", reason=_reason(body), actor=_ACTOR)
        )
        return JSONResponse(moved.to_json())

    async def failed(_request: Request, exc: Exception) -> Response:
        return _problem(409, str(exc))

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/engines/{variant}/metrics", engine_metrics),
            Route("/healthz", healthz),
            Route("/api/status", get_status),
            Route("/api/history", history),
            Route("/api/weight", weight, methods=["POST"]),
            Route("/api/rollback", rollback, methods=["POST"]),
            feedback_route(votes),
        ],
        exception_handlers={MoeServeError: failed},
    )


def exporter(state: Path, stack: StackState, votes: Votes) -> Exporter:
    """The collector of a stack's metrics."""

    def share() -> float | None:
        try:
            return read_split(state).percent / 100.0
        except MoeServeError:
            return None

    def name() -> str | None:
        try:
            return str(status(state)["state"])
        except MoeServeError:
            return None

    def decisions() -> dict[tuple[str, str], int]:
        try:
            changes = Store(state).history(limit=1_000_000)
        except MoeServeError:
            return {}
        # A person's words may be anything; as a label only whether there were some.
        # Those never taken are there as zero: a rate needs the sample before the first one.
        counted: Counter[tuple[str, str]] = Counter()
        counted.update({(known, "by hand"): 0 for known in DECISIONS})
        counted.update({(known, "by guards"): 0 for known in ("advance", "rollback")})
        counted.update(
            (c.decision, "by guards" if c.actor == controller.ACTOR else "by hand") for c in changes
        )
        return dict(counted)

    def guards() -> tuple[int, dict[tuple[str, str], float]] | None:
        try:
            saved = Store(state).saved()
        except MoeServeError:
            return None
        if not saved.state.active:
            return None
        found = saved.seen.get("decision", {}).get("evidence", [])
        ends = ("lower", "upper", "margin")
        return saved.state.step, {(e["guard"], end): e[end] for e in found for end in ends}

    def probed() -> Mapping[str, tuple[int, float, float]]:
        try:
            found = Store(state).saved().seen.get("quality")
        except MoeServeError:
            return {}
        return Quality.from_json(found).by_domain() if found is not None else {}

    engines = [
        Watched(
            variant=variant,
            pid=engine.pid,
            weight_bytes=_weight_bytes(Path(engine.model)),
            kv_bytes_per_token=kv_bytes_per_token(read_json(Path(engine.model) / "config.json")),
            source=Source(name=variant, url=f"{engine.url}/metrics"),
        )
        for variant, engine in stack.engines.items()
    ]
    return Exporter(
        model=stack.served_model,
        engines=engines,
        proxy=Endpoints(name="envoy", url=f"http://{stack.admin}/clusters?format=json"),
        weight=share,
        state=name,
        decisions=decisions,
        guards=guards,
        quality=probed,
        votes=votes.totals,
        expert_bytes=_expert_bytes(Path(stack.engines["pruned"].model)),
    )


def _weight_bytes(model: Path) -> int:
    """Size of the weight files an engine reads."""
    index = model / "model.safetensors.index.json"
    if index.exists():
        return int(read_json(index)["metadata"]["total_size"])
    return sum(file.stat().st_size for file in model.glob("model*.safetensors"))


def _expert_bytes(model: Path) -> dict[tuple[str, str], int]:
    """Per layer, from a manifest beside the weights if there is one."""
    path = model / "moe_serve.json"
    if not path.exists():
        return {}
    manifest = read_json(path)
    config = read_json(model / "config.json")
    neurons = {i: c["width"] * c["blocks"] for i, c in manifest["layers"].items()}
    kept = manifest["expert_bytes"]["kept"]
    if not neurons or not config.get("compact_experts"):
        return {}
    per_neuron = kept / sum(neurons.values())
    original = manifest["expert_bytes"]["original"] // len(neurons)
    sizes: dict[tuple[str, str], int] = {}
    for layer, count in neurons.items():
        sizes[layer, "kept"] = round(per_neuron * count)
        sizes[layer, "original"] = original
    return sizes


async def _body(request: Request) -> dict[str, Any] | None:
    raw = await request.body()
    if len(raw) > _MAX_BODY:
        return None
    try:
        value = json.loads(raw or b"{}")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _reason(body: dict[str, Any] | None) -> str:
    return str((body or {}).get("reason", ""))[:500]


def _problem(code: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, status_code=code)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--watch", action="store_true", help="drive rollouts by their policy")
    options = parser.parse_args()
    votes = Votes()
    watching = controller.start(options.state, _log, votes) if options.watch else None
    uvicorn.run(
        application(options.state, votes), host="127.0.0.1", port=options.port, log_level="warning"
    )
    if watching is not None:
        thread, stop = watching
        stop.set()
        thread.join(5.0)


def _log(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
