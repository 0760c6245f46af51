"""Who may ask the control process for what, decided before any of it is run.

Writing needs the token, or a page's session made from it. Reading needs it too where the address
is not loopback. Requests under a foreign host name (DNS rebinding) and writes that another page's
script or form sends (CSRF) are refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.serving.token import is_session, same, session_name

MAX_BODY: Final = 16_384
_BODY_SECONDS: Final = 10.0
"""A body that takes longer is given up."""
_READS: Final = ("GET", "HEAD", "OPTIONS")
_OPEN: Final = ("/healthz", "/login", "/static/")
"""Needed before there is a session. They tell nothing and change nothing."""
_ANYONE: Final = ("/feedback",)
"""Written to without the token where only this machine can: counts at a bounded rate."""
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # With "no-referrer" a browser would send our own forms under the origin "null".
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Where the control process listens."""

    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    """Host names, besides addresses and ``localhost``, under which it may be asked."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` header names it. An address can't be rebound, a name can."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name == "localhost" or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Access:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, token: str, bound: Bound) -> None:
        """See :class:`Bound` for what it depends on."""
        self._app, self._token, self._bound = app, token, bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        by_cookie = self._by_cookie(headers)
        known = by_cookie or self._by_bearer(headers)
        scope.setdefault("state", {})["may_write"] = known
        refused = self._refused(scope, headers, known=known, by_cookie=by_cookie)
        if refused is None:
            body = await _body(headers, receive)
            if isinstance(body, bytes):
                await self._app(scope, _replay(body, receive), hardened)
                return
            refused = body
        await refused(scope, receive, hardened)

    def _refused(
        self, scope: Scope, headers: Headers, *, known: bool, by_cookie: bool
    ) -> Response | None:
        host, path = headers.get("host", ""), scope["path"]
        if not self._bound.knows(host):
            return problem(
                421, "this host name is not known here; moe-serve up --control-name adds one"
            )
        reads = scope["method"] in _READS
        if not reads and not _same_origin(headers, host, asked=by_cookie or path == "/login"):
            return problem(403, "sent by another site's page")
        is_open = any(path == p or (p.endswith("/") and path.startswith(p)) for p in _OPEN)
        local = self._bound.is_loopback and (reads or path in _ANYONE)
        if known or is_open or local:
            return None
        if "text/html" in headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        answer = problem(401, "send the control token: authorization: Bearer TOKEN")
        answer.headers["www-authenticate"] = "Bearer"
        return answer

    def _by_bearer(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and same(given.strip(), self._token)

    def _by_cookie(self, headers: Headers) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        found = cookies.get(session_name(self._token))
        return found is not None and is_session(found.value, self._token, time.time())


def _same_origin(headers: Headers, host: str, *, asked: bool) -> bool:
    """Whether no other page sent it; ``asked``: a browser must say so itself.

    ``SameSite`` does not tell ports of one host apart, the origin does.
    """
    origin = headers.get("origin")
    if origin is not None:
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False
    site = headers.get("sec-fetch-site")
    return site == "same-origin" or (site is None and not asked)


async def _body(headers: Headers, receive: Receive) -> bytes | Response:
    """All of it, or the answer to one too large or too slow."""
    too_large = problem(413, f"a body has at most {MAX_BODY} bytes here")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return too_large
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                part: bytes = message.get("body", b"")
                body += part
                if len(body) > MAX_BODY:
                    return too_large
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        return problem(408, "the body took too long")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as if it had not been read; then what comes, which is a disconnection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def problem(code: int, message: str) -> Response:
    """An error as all of this API's are."""
    body = {"error": {"message": message, "code": code}}
    return Response(json.dumps(body), code, media_type="application/json")
