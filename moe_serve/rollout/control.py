"""The control process: API, page, ``/metrics``, the engines' own metrics, and the controller.

``python -m moe_serve.rollout.control --state DIR --port P``; on loopback unless told otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from moe_serve.errors import MoeServeError
from moe_serve.metrics.asking import CONNECTIONS
from moe_serve.metrics.exporter import Exporter
from moe_serve.rollout import api, controller
from moe_serve.rollout.access import Access, Bound, problem
from moe_serve.rollout.connections import Bounded
from moe_serve.rollout.events import Feed
from moe_serve.rollout.exports import exporter
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.installed import Installed
from moe_serve.rollout.vitals import Watch
from moe_serve.rollout.web.page import Page
from moe_serve.serving.state import StackState
from moe_serve.serving.token import read_token
from moe_serve.version import __version__

_LOOK: Final = 5.0
"""Seconds between looks at the engines, so that a page has rates when it is opened."""


def application(
    state: Path,
    bound: Bound | None = None,
    votes: Votes | None = None,
    installed: Installed | None = None,
) -> FastAPI:
    """The ASGI application of one stack.

    Args:
        state: its directory, with a token in it.
        bound: where it listens; by default loopback.
        votes: where feedback is counted; the controller reads it.
        installed: the package as this process began with it.

    Raises:
        MoeServeError: there is no stack or no token.
    """
    stack, votes = StackState.load(state), votes or Votes()
    installed = installed or Installed()

    async def broken(_request: Request, exc: Exception) -> Response:
        changed = await run_in_threadpool(installed.changed)
        return problem(503, changed) if changed else problem(500, f"{type(exc).__name__} here")

    collector = exporter(state, stack, votes)
    watch, feed = Watch(collector), Feed(state)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_keep_looking(watch))
        yield
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    app = FastAPI(
        title="moe_serve control",
        version=__version__,
        description="Where traffic goes between a model and its pruned copy, and why.",
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        openapi_url="/api/openapi.json",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            MoeServeError: _failed,
            HTTPException: _not_served,
            RequestValidationError: _not_valid,
            Exception: broken,
        },
    )
    app.include_router(api.routes(state, watch, feed))
    token = read_token(state)
    app.include_router(api.voting(votes))
    app.router.routes += [*Page(state, watch, token).routes()]
    _plain(app, stack, collector)
    app.add_middleware(Access, token=token, bound=bound or Bound())
    return app


def _plain(app: FastAPI, stack: StackState, collector: Exporter) -> None:
    """What machines ask for: metrics and health."""
    registry = CollectorRegistry()
    registry.register(collector)

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/engines/{variant}/metrics", include_in_schema=False)
    def engine_metrics(variant: str) -> Response:
        engine = stack.engines.get(variant)
        if engine is None:
            return problem(404, f"no engine {variant!r}")
        try:
            told = CONNECTIONS.answer(f"{engine.url}/metrics", timeout=5.0)
        except OSError as exc:
            return problem(502, f"the engine does not answer ({type(exc).__name__})")
        return Response(told.body, told.status, media_type=told.kind)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return PlainTextResponse("ok")


async def _keep_looking(watch: Watch) -> None:
    while True:
        with suppress(Exception):
            # Whatever is wrong shows in /metrics, which asks the same.
            await run_in_threadpool(watch.look)
        await asyncio.sleep(_LOOK)


async def _failed(_request: Request, exc: Exception) -> Response:
    return problem(409, str(exc))


async def _not_served(_request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise exc
    answer = problem(exc.status_code, str(exc.detail))
    answer.headers.update(exc.headers or {})
    return answer


async def _not_valid(_request: Request, exc: Exception) -> Response:
    if not isinstance(exc, RequestValidationError):
        raise exc
    found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
    return problem(422, "; ".join(found))


def server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """What serves it, with the limits of this port."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Bounded,
            log_level="warning",
            # Nothing about us, and event streams do not keep a stop waiting.
            server_header=False,
            timeout_graceful_shutdown=1,
            limit_concurrency=256,
        )
    )


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--name", action="append", default=[], help="a host name to answer to")
    parser.add_argument("--watch", action="store_true", help="drive rollouts by their policy")
    options = parser.parse_args()
    bound = Bound(host=options.host, names=tuple(options.name))
    votes, installed = Votes(), Installed()
    app = application(options.state, bound, votes, installed)
    watching = controller.start(options.state, _log, votes, installed) if options.watch else None
    # uvicorn hands a signal on once it has stopped; the default would end us before the lease is
    # given back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # What was imported stays: not looking through it again at every scrape saves a quarter of one.
    gc.collect()
    gc.freeze()
    try:
        server(app, options.host, options.port).run()
    finally:
        if watching is not None:
            thread, stop = watching
            stop.set()
            thread.join(5.0)


def _log(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
