"""The page: rendered here, so that it reads without JavaScript; forms, so that it acts without."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, get_args
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from moe_serve.errors import MoeServeError
from moe_serve.rollout import schema
from moe_serve.rollout.access import problem
from moe_serve.rollout.actions import act
from moe_serve.rollout.vitals import Watch
from moe_serve.rollout.web.shown import figure, page
from moe_serve.rollout.web.words import LANGUAGES, Words, moment, preferred
from moe_serve.serving.token import SESSION_SECONDS, new_session, same, session_name

_FOLDER: Final = Path(__file__).parent
_STATIC: Final = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_ACTOR: Final = "page"
_YEAR: Final = 365 * 86_400


class Page:
    """All that is served as HTML."""

    def __init__(self, state: Path, watch: Watch, token: str) -> None:
        """Of one stack."""
        self._state, self._watch, self._token = state, watch, token
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            asset=lambda name: f"/static/{name}?{_asset(name)[1]}",
            languages=LANGUAGES,
            moment=moment,
            figure=figure,
        )

    def routes(self) -> list[Route]:
        """To be mounted beside the API."""
        return [
            Route("/", self._show),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/logout", self._logout, methods=["POST"]),
            Route("/act/{action}", self._act, methods=["POST"]),
            Route("/static/{name}", _static),
        ]

    def _render(
        self, request: Request, name: str, code: int, values: Callable[[Words], dict[str, Any]]
    ) -> Response:
        words, done = self._words(request), request.query_params.get("done", "")
        text = self._templates.get_template(name).render(
            words=words,
            signed_in=request.state.may_write,
            done=done if done in get_args(schema.Action) else "",
            **values(words),
        )
        headers = {"vary": "accept-language, cookie", "content-language": words.language}
        answer = HTMLResponse(text, code, headers)
        if request.query_params.get("lang") in LANGUAGES:
            answer.set_cookie(
                "lang", words.language, max_age=_YEAR, httponly=True, samesite="strict"
            )
        return answer

    @staticmethod
    def _words(request: Request) -> Words:
        asked = request.query_params.get("lang") or request.cookies.get("lang")
        return Words(preferred(asked, request.headers.get("accept-language", "")))

    async def _show(self, request: Request) -> Response:
        text = request.query_params.get("before", "")
        before = int(text) if text.isdecimal() and len(text) < 16 else None

        def values(words: Words) -> dict[str, Any]:
            return {
                "problem": "",
                "before": before,
                **page(self._state, self._watch.known(), words, before),
            }

        try:
            return await run_in_threadpool(self._render, request, "page.html", 200, values)
        except MoeServeError as exc:
            return self._trouble(request, exc, 503)

    def _trouble(self, request: Request, exc: MoeServeError, code: int) -> Response:
        return self._render(request, "trouble.html", code, lambda _: {"problem": str(exc)})

    async def _login(self, request: Request) -> Response:
        wrong = False
        if request.method == "POST":
            form = await _form(request)
            if same(form.get("token", "").strip(), self._token):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(
                    session_name(self._token),
                    new_session(self._token, time.time()),
                    max_age=SESSION_SECONDS,
                    httponly=True,
                    samesite="strict",
                    secure=request.url.scheme == "https",
                )
                return answer
            wrong = True
        return self._render(
            request, "login.html", 403 if wrong else 200, lambda _: {"wrong": wrong}
        )

    async def _logout(self, _request: Request) -> Response:
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(session_name(self._token), httponly=True, samesite="strict")
        return answer

    async def _act(self, request: Request) -> Response:
        action, form = request.path_params["action"], await _form(request)
        if action not in get_args(schema.Action):
            return problem(404, "no such action")
        try:
            percent = float(form.get("percent") or "0")
        except ValueError:
            percent = float("nan")
        try:
            await run_in_threadpool(
                act,
                self._state,
                action,
                actor=_ACTOR,
                reason=form.get("reason", "")[:500],
                percent=percent,
                force="force" in form,
            )
        except MoeServeError as exc:
            return self._trouble(request, exc, 409)
        return RedirectResponse(f"/?{urlencode({'done': action})}", 303)


async def _form(request: Request) -> dict[str, str]:
    text = (await request.body()).decode("utf-8", "replace")
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=20))
    except ValueError:
        return {}


@lru_cache
def _asset(name: str) -> tuple[bytes, str]:
    """A file's bytes, and a digest that changes its address when it changes."""
    data = (_FOLDER / name).read_bytes()
    return data, hashlib.sha256(data).hexdigest()[:12]


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        return problem(404, "no such file")
    headers = {"cache-control": f"public, max-age={_YEAR}, immutable"}
    return Response(_asset(name)[0], headers=headers, media_type=_STATIC[name])
