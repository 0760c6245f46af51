"""A Gateway API ``HTTPRoute`` as the place of the split: on Kubernetes, the cluster's own gateway.

Of the route only the weights of the two backends, copies to the pruned one, and an annotation with
the split's version are ever written; rules that lead to one backend alone stay as they are. Each
write names the resource version it was read at, so that nobody's change is lost: on a conflict the
route is read again. The client is the official one, imported when it is first needed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from moe_serve.errors import OutputError, Overtaken, RolloutError
from moe_serve.serving.routes import TOTAL, Split

GROUP: Final = "gateway.networking.k8s.io"
VERSION: Final = "moe-serve.dev/split-version"
"""The annotation."""
MANAGER: Final = "moe-serve"
"""Who we are in ``managedFields``."""
_MIRROR: Final = "RequestMirror"
_PATIENCE: Final = (2.0, 5.0)
"""Seconds to connect, and to wait for an answer."""
_ATTEMPTS: Final = 5
_AGAIN: Final = frozenset({409, 429, 500, 502, 503, 504})
"""Answers after which another attempt may get through."""


class _Unanswered(RolloutError):
    """Nobody knows whether the request was carried out."""


class _Refused(RolloutError):
    """The API server said no; ``status`` is HTTP's."""

    status = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpRoute:
    """One route, and the names of the Services it splits between."""

    namespace: str
    name: str
    original: str
    pruned: str
    pruned_port: int
    restores: bool = False
    """Whether weights that someone else wrote are put back, rather than kept and recorded."""

    @property
    def sticks(self) -> bool:
        """Session persistence is not in the Gateway API's standard channel."""
        return False

    @property
    def where(self) -> str:
        """For messages."""
        return f"HTTPRoute {self.namespace}/{self.name}"

    def read(self) -> Split:
        """The split in the cluster now, whoever wrote it.

        Raises:
            RolloutError: it can't be read, or holds no split between the two Services.
        """
        return self._split(self._get())

    def put(self, split: Split, *, over: Split | None = None) -> None:
        """Write a split.

        Args:
            split: of its stickiness nothing is written; routes of this kind have none.
            over: refuse where the route no longer says this.

        Raises:
            OutputError: it could not be written, or nobody knows whether it was.
            Overtaken: the route says something else than ``over``.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0.02, 0.1) * attempt)
            try:
                route = self._get()
                if attempt and _version(route) == split.version:
                    return  # The write got through, though its answer did not.
                self._expect(route, over)
                self._written(self._patch(route, split), split)
            except _Unanswered as exc:
                last: RolloutError = exc
            except _Refused as exc:
                if exc.status not in _AGAIN:
                    raise OutputError(exc.what, where=exc.where, remedy=exc.remedy) from exc
                last = exc
            else:
                return
        raise OutputError(
            f"not written after {_ATTEMPTS} attempts: {last.what}",
            where=self.where,
            remedy="the gateway goes on with the weights it has; is the API server reachable?",
        ) from last

    def fall_back(self, refused: OutputError) -> Split:
        """There is nothing else a rollback could write.

        Raises:
            OutputError: ``refused``.
        """
        raise refused

    def digest(self) -> str | None:
        """Hash of what is written, ``None`` where it can't be read."""
        try:
            return self.digest_of(self.read())
        except RolloutError:
            return None

    @staticmethod
    def digest_of(split: Split) -> str:
        """Hash of a split as it is written."""
        return hashlib.sha256(f"{split.version} {split.pruned} {split.shadow}".encode()).hexdigest()

    def edited(self) -> tuple[str, float]:
        """Who changed it, in words, and when, as far as the cluster says."""
        try:
            fields = self._get()["metadata"].get("managedFields", ())
        except RolloutError:
            fields = ()
        others = [
            str(f.get("manager", "someone"))
            for f in sorted(fields, key=lambda f: str(f.get("time", "")))
            if f.get("manager") != MANAGER and f.get("subresource") != "status"
        ]
        return f"the HTTPRoute was changed by {others[-1] if others else 'someone'}", time.time()

    def in_force(self) -> str | None:
        """Version of the split that every gateway of the route has accepted, if they say so.

        Raises:
            RolloutError: the route can't be read.
        """
        route = self._get()
        generation = route["metadata"].get("generation", 0)
        parents = route.get("status", {}).get("parents", [])
        taken = [
            {c["type"]: c["status"] for c in parent.get("conditions", ())}
            for parent in parents
            if all(
                c.get("observedGeneration", 0) >= generation for c in parent.get("conditions", ())
            )
        ]
        good = {"Accepted": "True", "ResolvedRefs": "True"}
        if not parents or len(taken) < len(parents):
            return None
        return _version(route) if all(good.items() <= found.items() for found in taken) else None

    def confirm(self, version: str, timeout: float = 5.0) -> None:
        """Wait until a split is in force.

        Raises:
            RolloutError: no gateway said so in time.
        """
        until = time.monotonic() + timeout
        while self.in_force() != version:
            if time.monotonic() > until:
                raise RolloutError(
                    f"no gateway has accepted the new weights after {timeout:g} s",
                    where=self.where,
                    remedy=f"kubectl -n {self.namespace} describe httproute {self.name}",
                )
            time.sleep(0.1)

    def _get(self) -> dict[str, Any]:
        with self._asking():
            found: dict[str, Any] = _api(_settings()).get_namespaced_custom_object(
                **self._address(), _request_timeout=_PATIENCE
            )
            return found

    def _written(self, route: dict[str, Any], split: Split) -> None:
        """An API server drops what its schema does not know: a share of copies becomes all."""
        if self._split(route).shadow == split.shadow:
            return
        self._patch(route, replace(split, shadow=0))
        raise OutputError(
            "the cluster's Gateway API cannot copy a share of the traffic; nothing is copied now",
            where=self.where,
            remedy="install Gateway API v1.3 or newer, or leave shadow steps out of the policy",
        )

    def _patch(self, route: dict[str, Any], split: Split) -> dict[str, Any]:
        body = {
            "metadata": {
                "resourceVersion": route["metadata"]["resourceVersion"],
                "annotations": {VERSION: split.version},
            },
            "spec": {"rules": self._rules(route, split)},
        }
        with self._asking():
            patched: dict[str, Any] = _api(_settings()).patch_namespaced_custom_object(
                **self._address(),
                body=body,
                field_manager=MANAGER,
                _content_type="application/merge-patch+json",
                _request_timeout=_PATIENCE,
            )
            return patched

    def _address(self) -> dict[str, str]:
        place = {"group": GROUP, "version": "v1", "plural": "httproutes"}
        return {**place, "namespace": self.namespace, "name": self.name}

    def _expect(self, route: dict[str, Any], over: Split | None) -> None:
        if over is not None and self._split(route) != over:
            raise Overtaken(
                "someone else changed the weights in between",
                where=self.where,
                remedy="look at moe-serve rollout status, then decide again",
            )

    def _split(self, route: dict[str, Any]) -> Split:
        try:
            ((pruned, shadow),) = {self._shares(rule) for rule in self._split_rules(route)}
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
            raise RolloutError(
                f"is no split between {self.original} and {self.pruned} ({exc})",
                where=self.where,
                remedy="rules that name both must say the same; moe-serve rollout rollback sees "
                "to that",
            ) from exc
        return Split(pruned=pruned, version=_version(route), shadow=shadow, sticky=())

    def _shares(self, rule: dict[str, Any]) -> tuple[int, int]:
        """Pruned and copied parts of 10,000."""
        weights = {b["name"]: int(b.get("weight", 1)) for b in rule["backendRefs"]}
        both = weights[self.original] + weights[self.pruned]
        if sum(weights.values()) != both:
            raise ValueError(f"it leads to {', '.join(weights)}")
        shadow = sum(
            _copied(f["requestMirror"]) for f in rule.get("filters", ()) if self._mirrors(f)
        )
        return round(weights[self.pruned] * TOTAL / both), shadow

    def _rules(self, route: dict[str, Any], split: Split) -> list[dict[str, Any]]:
        """The route's rules with the split in them."""
        rules: list[dict[str, Any]] = copy.deepcopy(route["spec"].get("rules", []))
        found = [*self._split_rules({"spec": {"rules": rules}})]
        if not found:
            raise OutputError(
                f"no rule leads to both {self.original} and {self.pruned}",
                where=self.where,
                remedy="give the HTTPRoute a rule with both services as backends",
            )
        weights = {self.original: TOTAL - split.pruned, self.pruned: split.pruned}
        mirror = {
            "backendRef": {"name": self.pruned, "port": self.pruned_port},
            "fraction": {"numerator": split.shadow, "denominator": TOTAL},
        }
        for rule in found:
            for backend in rule["backendRefs"]:
                backend["weight"] = weights.get(backend["name"], 0)
            filters = [f for f in rule.pop("filters", ()) if not self._mirrors(f)]
            if split.shadow:
                filters.append({"type": _MIRROR, "requestMirror": mirror})
            if filters:
                rule["filters"] = filters
        return rules

    def _split_rules(self, route: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for rule in route["spec"].get("rules", ()):
            if {self.original, self.pruned} <= {b["name"] for b in rule.get("backendRefs", ())}:
                yield rule

    def _mirrors(self, found: dict[str, Any]) -> bool:
        return (
            found.get("type") == _MIRROR
            and found["requestMirror"]["backendRef"]["name"] == self.pruned
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Translate what the client raises."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            yield
        except urllib3.exceptions.HTTPError as exc:
            raise _Unanswered(
                f"the API server does not answer ({type(exc).__name__})", where=self.where
            ) from exc
        except ApiException as exc:
            raise self._refused(exc.status or 0, str(exc.reason)) from exc

    def _refused(self, status: int, reason: str) -> _Refused:
        what, remedy = {
            401: ("the API server does not know us", "is the service account's token mounted?"),
            403: (
                "we may not",
                "deploy/kubernetes/overlays/gateway-api/rights.yaml gives the right",
            ),
            404: ("is not there", "apply it again; traffic has nowhere to go until then"),
            422: (
                "the API server finds the new weights invalid",
                "is its Gateway API v1.3 or newer?",
            ),
        }.get(status, (f"the API server answered {status} {reason}", ""))
        error = _Refused(what, where=self.where, remedy=remedy or None)
        error.status = status
        return error


def _version(route: dict[str, Any]) -> str:
    return str((route["metadata"].get("annotations") or {}).get(VERSION, ""))


def _copied(mirror: dict[str, Any]) -> int:
    """Parts of 10,000 that a mirror copies; all where it says nothing."""
    if "fraction" in mirror:
        part = mirror["fraction"]
        return round(int(part["numerator"]) * TOTAL / int(part.get("denominator", 100)))
    return int(mirror.get("percent", 100)) * TOTAL // 100


def _settings() -> str:
    """File with the cluster's address and who we are; empty inside a pod."""
    return os.environ.get("KUBECONFIG", "")


@functools.lru_cache(maxsize=4)
def _api(kubeconfig: str) -> Any:
    """The client, kept so that connections are.

    Raises:
        RolloutError: it is not installed, or knows no cluster.
    """
    try:
        from kubernetes import client, config
    except ImportError as exc:
        raise RolloutError(
            "the Kubernetes client is not installed",
            remedy="pip install 'moe-serve[kubernetes]'",
            where="kubernetes",
        ) from exc
    found = client.Configuration()
    # Attempts are counted here; the client's own would multiply the patience.
    found.retries = False
    load: Callable[..., Any] = (
        functools.partial(config.load_kube_config, config_file=kubeconfig)
        if kubeconfig
        else config.load_incluster_config
    )
    try:
        load(client_configuration=found)
    except config.ConfigException as exc:
        raise RolloutError(
            f"no cluster is known ({exc})",
            where="KUBECONFIG",
            remedy="run in a pod with a service account, or name a kubeconfig",
        ) from exc
    return client.CustomObjectsApi(client.ApiClient(found))
