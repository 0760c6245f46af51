"""The HTTP API: what can be read and done, and events as they come.

Who may is settled before (:mod:`moe_serve.rollout.access`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, HTTPException, Query, Security
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from moe_serve.rollout import schema, view
from moe_serve.rollout.actions import act
from moe_serve.rollout.events import MOST, Feed
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.vitals import Watch

_ACTOR: Final = "api"
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"model": schema.Problem, "description": text}
    for code, text in {
        400: "Not a request that can be read.",
        401: "The token is missing or wrong.",
        403: "Sent by another site's page.",
        409: "It can't be done as things stand; the message says what to do.",
        413: "The body is too large.",
        421: "An unknown host name.",
        422: "A field is missing, unknown or out of range.",
        503: "Too many streams, or the record can't be read.",
    }.items()
}
_BEARER: Final = HTTPBearer(auto_error=False, description="The control token.")
Limit = Annotated[int, Query(ge=1, le=200)]
After = Annotated[int | None, Query(ge=0, le=2**53)]
LastEvent = Annotated[str | None, Header(pattern=r"^\d{1,15}$")]


def routes(state: Path, watch: Watch, feed: Feed) -> APIRouter:
    """All of ``/api``."""
    api = APIRouter(prefix="/api", responses=_PROBLEMS)
    _reading(api, state, watch, feed)
    _writing(api, state)
    return api


def voting(votes: Votes) -> APIRouter:
    """``/feedback``, for applications: it takes no token where only this machine reaches it."""
    router = APIRouter(responses=_PROBLEMS)

    @router.post(
        "/feedback",
        status_code=204,
        responses={429: {"model": schema.Problem, "description": "Too many; not counted."}},
    )
    def feedback(body: schema.Vote) -> None:
        """Count a vote on an answer."""
        if not votes.add(body.variant, good=body.good):
            raise HTTPException(429, "too many votes; this one was not counted")

    return router


def _reading(api: APIRouter, state: Path, watch: Watch, feed: Feed) -> None:
    @api.get("/status")
    def status() -> schema.Status:
        """Where traffic goes and how the rollout stands."""
        return view.look(state)

    @api.get("/history")
    def history(limit: Limit = 50, before: After = None) -> schema.HistoryPage:
        """Changes of the split with their evidence, newest first."""
        return view.history(state, limit, before)

    @api.get("/guards")
    def guards(points: Annotated[int, Query(ge=2, le=2000)] = 240) -> schema.Guards:
        """Each guard's interval now, and how it went since the rollout began."""
        return view.guards(state, points)

    @api.get("/policy")
    def policy() -> schema.PolicyOut:
        """The rules of the rollout under way, or those of the next one."""
        return view.policy(state)

    @api.get("/variants")
    def variants() -> schema.Variants:
        """Memory, throughput and latency of both engines; quality per domain where it is probed."""
        return watch.known()

    @api.get(
        "/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "`log`: a new line of the audit log, with its id; `status`: the"
                " status, at once and whenever it changes.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            }
        },
    )
    async def events(last_event_id: LastEvent = None) -> StreamingResponse:
        """Server-sent events; after a break, `Last-Event-ID` brings what was missed."""
        if feed.listeners >= MOST:
            raise HTTPException(503, f"{MOST} streams are open already")
        since = None if last_event_id is None else int(last_event_id)
        return StreamingResponse(feed.listen(since), media_type="text/event-stream")


def _writing(api: APIRouter, state: Path) -> None:
    guarded = [Security(_BEARER)]

    @api.post("/start", dependencies=guarded)
    def start(body: schema.Begin) -> schema.Done:
        """Begin with the policy's first step."""
        return act(state, "start", actor=_ACTOR, reason=body.reason, force=body.force)

    @api.post("/pause", dependencies=guarded)
    def pause(body: schema.Reason) -> schema.Done:
        """Keep the share as it is; guards go on watching."""
        return act(state, "pause", actor=_ACTOR, reason=body.reason)

    @api.post("/resume", dependencies=guarded)
    def resume(body: schema.Reason) -> schema.Done:
        """Go on after a pause, or open a step's gate."""
        return act(state, "resume", actor=_ACTOR, reason=body.reason)

    @api.post("/promote", dependencies=guarded)
    def promote(body: schema.Reason) -> schema.Done:
        """Send everything to the pruned variant."""
        return act(state, "promote", actor=_ACTOR, reason=body.reason)

    @api.post("/rollback", dependencies=guarded)
    def rollback(body: schema.Reason) -> schema.Done:
        """Send everything to the original, at once."""
        return act(state, "rollback", actor=_ACTOR, reason=body.reason)

    @api.post("/weight", dependencies=guarded)
    def weight(body: schema.Weight) -> schema.Done:
        """Give the pruned variant a share of the traffic; pauses a rollout."""
        percent = float(body.pruned_percent)
        return act(state, "set", actor=_ACTOR, reason=body.reason, percent=percent)
