"""Envoy's route file: who gets which share of the traffic. The only thing a rollback changes.

Envoy watches the directory and reloads on rename. The weights add up to 10,000, a constant, so
that a ramp moves requests one way only. Nothing heavy is imported here: rolling back must be quick.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import OutputError, RolloutError
from moe_serve.files import write_atomic, writing
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED

TOTAL: Final = 10_000
ROUTES: Final = "routes"
"""The watched folder inside the state directory."""
FILE: Final = "routes.json"
SPARE: Final = "spare-routes.json"
"""Beside the watched folder: what a rollback puts in force where nothing can be written."""
NAME: Final = "moe_serve"
ANSWERED_BY: Final = "%UPSTREAM_METADATA(moe_serve:variant)%"
"""Envoy's way to write the variant of whom a request went to."""
ASKED: Final = ("/v1/completions", "/v1/chat/completions")
"""Where a model answers: the requests that guards count."""
PATHS: Final = ("/v1/models", *ASKED, "/health")
"""What clients may reach; engines have control paths that must stay closed."""
ASIDE: Final = "-aside"
"""Ends the names of the clusters, of the same engines, that all else goes through. A monitor that
asks for ``/health`` every second would drown failures in answers that no model gave."""
WITH_FALLBACK: Final = "pruned-or-original"
"""The cluster that serves pruned traffic, from the original while the pruned engine is down."""
OR_PRUNED: Final = "original-or-pruned"
"""The other way round; in use while pruned has users at all. At 0 % nobody chose it for anyone, and
an original that is down is down."""


COOKIE_SECONDS: Final = 7 * 86_400
"""How long a cookie that the proxy sets keeps a browser on its variant."""
STICKY: Final = ("header:x-user-id", "cookie:moe-serve-user")
"""What tells users apart unless a policy says otherwise."""
_REQUEST: Final = "x-request-id"
"""The proxy's own, random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The route file's content: the pruned variant's share and a version."""

    pruned: int
    """Parts of 10,000."""
    version: str
    shadow: int = 0
    """Parts of 10,000 that are copied to the pruned variant, its answers thrown away."""
    sticky: tuple[str, ...] = STICKY
    """``header:NAME`` and ``cookie:NAME``: the first that a request has is hashed to choose;
    without any it is chance. Cookies are set for browsers only: a program that keeps them is most
    often a server, and its users would move all together."""

    resting: bool = False
    """Whether the original may be asleep: who asks for it by name is told so, and does not wait."""

    @property
    def percent(self) -> float:
        """The pruned variant's share, 0 to 100."""
        return 100.0 * self.pruned / TOTAL

    @property
    def shadow_percent(self) -> float:
        """The share that is copied, 0 to 100."""
        return 100.0 * self.shadow / TOTAL

    def encode(self) -> bytes:
        """The route file."""
        return json.dumps(_discovery(self), indent=1).encode()


def route_file(state: Path) -> Path:
    """Where the route file of a state directory lies."""
    return state / ROUTES / FILE


def new_split(
    percent: float,
    *,
    shadow: float = 0.0,
    sticky: tuple[str, ...] = STICKY,
    shares_gpu: bool = False,
) -> Split:
    """A split under a new version.

    With ``shares_gpu`` the original rests where it has no share.

    Raises:
        RolloutError: a share is out of range.
    """
    for share in (percent, shadow):
        if not 0.0 <= share <= 100.0:
            raise RolloutError(
                f"{share:g} is not a share between 0 and 100",
                remedy="give a percentage",
                where="share of traffic",
            )
    return Split(
        pruned=round(percent * TOTAL / 100),
        version=f"{time.time_ns()}",
        shadow=round(shadow * TOTAL / 100),
        sticky=sticky,
        resting=shares_gpu and percent == 100.0,
    )


def put_split(state: Path, split: Split) -> None:
    """Put a split in force; Envoy picks it up from the rename.

    Raises:
        OutputError: the file can't be written; the old split stays.
    """
    path = route_file(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, split.encode())
    _keep_spare(state)


def put_spare(state: Path) -> Split:
    """Put the spare in force: everything on the original, by a rename alone.

    For a disk that takes no new byte.

    Raises:
        OutputError: there is none, or even a rename fails.
    """
    path = route_file(state)
    with writing(path):
        (state / SPARE).replace(path)
    return read_split(state)


def _keep_spare(state: Path) -> None:
    """See that there is one, in today's layout; where it can't be written it is done without."""
    path = state / SPARE
    with suppress(OSError, ValueError, KeyError):
        found = path.read_bytes()
        version = str(json.loads(found)["version_info"])
        if found == Split(pruned=0, version=version).encode():
            return
    with suppress(OutputError):
        write_atomic(path, new_split(0.0).encode())


def write_split(state: Path, percent: float) -> Split:
    """Put a new split in force.

    Args:
        state: the stack's state directory.
        percent: the pruned variant's share, 0 to 100.

    Raises:
        RolloutError: the share is out of range.
        OutputError: the file can't be written; the old split stays.
    """
    split = new_split(percent)
    put_split(state, split)
    return split


def read_split(state: Path) -> Split:
    """What the file says now, whoever wrote it.

    Raises:
        RolloutError: there is none, or it holds no split of ours.
    """
    path = route_file(state)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        routes = value["resources"][0]["virtual_hosts"][0]["routes"]
        weighted = [
            route["route"]
            for route in routes
            if "weighted_clusters" in route.get("route", {})
            and "headers" not in route["match"]
            and route["match"].get("path") in ASKED
        ]
        # All paths where a model answers must say the same.
        ((pruned, shadow, sticky),) = {_shares(route) for route in weighted}
        return Split(
            pruned=pruned,
            version=str(value.get("version_info", "")),
            shadow=shadow,
            sticky=sticky,
            resting=any(
                "direct_response" in route for route in routes if "headers" in route["match"]
            ),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as exc:
        raise RolloutError(
            f"is not a route file ({type(exc).__name__}: {exc})",
            where=str(path),
            remedy="moe-serve rollout rollback writes a good one",
        ) from exc


def _shares(route: dict[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    """Pruned parts, copied parts and what is hashed, of one route."""
    weights = {c["name"]: int(c["weight"]) for c in route["weighted_clusters"]["clusters"]}
    pruned = round(weights[WITH_FALLBACK] * TOTAL / sum(weights.values()))
    mirrors = route.get("request_mirror_policies", ())
    shadow = sum(int(m["runtime_fraction"]["default_value"]["numerator"]) for m in mirrors)
    sticky = tuple(
        f"header:{policy['header']['header_name']}"
        if "header" in policy
        else f"cookie:{policy['cookie']['name']}"
        for policy in route.get("hash_policy", ())
    )
    return pruned, shadow, sticky


def _discovery(split: Split) -> dict[str, Any]:
    configuration = {
        "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "name": NAME,
        "virtual_hosts": [
            {
                "name": NAME,
                "domains": ["*"],
                "response_headers_to_add": [
                    {
                        # The endpoint that answered says which it is, also after a fail-over.
                        "header": {
                            "key": HEADER,
                            "value": ANSWERED_BY,
                        },
                        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                    }
                ],
                "routes": [*_routes(split), _nothing_else(split.version)],
            }
        ],
    }
    return {"version_info": split.version, "resources": [configuration]}


def _routes(split: Split) -> list[dict[str, Any]]:
    routes = []
    for path in PATHS:
        side = "" if path in ASKED else ASIDE
        for variant in (ORIGINAL, PRUNED):
            pinned = {"name": HEADER, "string_match": {"exact": variant}}
            match = {"path": path, "headers": [pinned]}
            if variant == ORIGINAL and split.resting:
                # The listener words it: no engine can take this request now.
                routes.append({"match": match, "direct_response": {"status": 503}})
            else:
                route = {"cluster": f"{variant}{side}", **_patience()}
                routes.append({"match": match, "route": route})
        weighted = _weighted(split, side)
        routes += _first_visit(path, weighted, split.sticky)
        told = {} if side else {"metadata": _told_apart(*split.sticky)}
        routes.append({"match": {"path": path}, "route": {**weighted, **_patience()}, **told})
    return routes


def _weighted(split: Split, side: str) -> dict[str, Any]:
    """By the shares; ``side`` ends the names of the clusters."""
    other = OR_PRUNED if split.pruned else ORIGINAL
    weighted: dict[str, Any] = {
        "weighted_clusters": {
            "clusters": [
                {"name": f"{other}{side}", "weight": TOTAL - split.pruned},
                {"name": f"{WITH_FALLBACK}{side}", "weight": split.pruned},
            ]
        }
    }
    if split.shadow:
        fraction = {"numerator": split.shadow, "denominator": "TEN_THOUSAND"}
        mirror = {"cluster": f"{PRUNED}{side}", "runtime_fraction": {"default_value": fraction}}
        weighted["request_mirror_policies"] = [mirror]
    if split.sticky:
        weighted["weighted_clusters"]["use_hash_policy"] = True
        weighted["hash_policy"] = [_hashed(each) for each in split.sticky]
    return weighted


def _told_apart(*ways: str) -> dict[str, Any]:
    """What the listener's filter counts users by."""
    return {"filter_metadata": {"envoy.filters.http.lua": {"sticky": list(ways)}}}


def _hashed(sticky: str) -> dict[str, Any]:
    """One thing to hash; what is found first is all that counts."""
    kind, _, name = sticky.partition(":")
    what = {"header": {"header_name": name}} if kind == "header" else {"cookie": {"name": name}}
    return {**what, "terminal": True}


def _first_visit(
    path: str, weighted: dict[str, Any], sticky: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The route of a browser that is not known yet: it gets a cookie.

    Envoy sets the cookies of a hash policy for a load balancer's choice only, not for a weighted
    cluster's. The request's own id is what is hashed here and what the cookie keeps, so that the
    first answer comes from the same variant as all after it.
    """
    names = [way.partition(":")[2] for way in sticky]
    cookies = [name for way, name in zip(sticky, names, strict=True) if way.startswith("cookie:")]
    if not cookies:
        return []
    unknown = [
        {"name": name, "present_match": True, "invert_match": True}
        for way, name in zip(sticky, names, strict=True)
        if way.startswith("header:")
    ]
    unknown += [
        {
            "name": "cookie",
            "string_match": {"contains": f"{name}="},
            "invert_match": True,
            "treat_missing_header_as_empty": True,
        }
        for name in cookies
    ]
    browser = {"name": "user-agent", "string_match": {"prefix": "Mozilla/"}}
    kept = f"Max-Age={COOKIE_SECONDS}; Path=/; HttpOnly; SameSite=Lax"
    cookie = {"key": "set-cookie", "value": f"{cookies[0]}=%REQ({_REQUEST})%; {kept}"}
    return [
        {
            "match": {"path": path, "headers": [browser, *unknown]},
            "route": {
                **weighted,
                "hash_policy": [_hashed(f"header:{_REQUEST}")],
                **_patience(),
            },
            **({"metadata": _told_apart(f"header:{_REQUEST}")} if path in ASKED else {}),
            "response_headers_to_add": [
                {"header": cookie, "append_action": "APPEND_IF_EXISTS_OR_ADD"}
            ],
        }
    ]


def _patience() -> dict[str, Any]:
    """Streams last as long as they last; a retry happens only before a byte was sent."""
    return {
        "timeout": "0s",
        "idle_timeout": "600s",
        "retry_policy": {
            # "reset" is only retried while no response header has been passed on.
            "retry_on": "connect-failure,refused-stream,reset",
            "num_retries": 3,
            "retry_back_off": {"base_interval": "0.05s", "max_interval": "0.5s"},
        },
    }


def _nothing_else(version: str) -> dict[str, Any]:
    """The last route, which holds the version too.

    Envoy passes over routes that are the same but for their version, and would never say that a
    split put in force twice is in force.
    """
    body = {"error": {"message": "no such path here", "type": "not_found", "code": 404}}
    return {
        "match": {"prefix": "/"},
        "metadata": {"filter_metadata": {"moe_serve": {"version": version}}},
        "direct_response": {"status": 404, "body": {"inline_string": json.dumps(body)}},
    }
