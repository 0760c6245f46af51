"""A server of this stack, asked on its own machine: Envoy's admin interface, an engine.

With the standard library alone: a rollback must not wait for anything else to be imported.
"""

from __future__ import annotations

import http.client

from moe_serve.errors import RolloutError

_OK = 200


def ask(name: str, address: str, method: str, path: str, *, seconds: float) -> str:
    """The body of its answer.

    Args:
        name: what it is to a person, e.g. ``Envoy``.
        address: ``host:port``.
        method: of the request.
        path: with its query.
        seconds: how long to wait for it.

    Raises:
        RolloutError: none came, or one with another status than 200.
    """
    connection = http.client.HTTPConnection(address, timeout=seconds)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read().decode()
    except (OSError, http.client.HTTPException) as exc:
        raise RolloutError(
            f"{name} does not answer ({exc or type(exc).__name__})",
            where=f"{address}{path}",
            remedy="see that moe-serve up runs; the logs are in its state directory",
        ) from exc
    finally:
        connection.close()
    if response.status != _OK:
        raise RolloutError(
            f"{name} answered {response.status}: {body[:200]}",
            where=f"{address}{path}",
            remedy="the logs in the state directory say why",
        )
    return body
