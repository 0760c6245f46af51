"""API keys: kept as hashes, checked in the proxy, so that they hold with the control process dead.

``keys.json`` in the state directory, readable by its owner only.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import UsageError
from moe_serve.files import read_json, write_atomic
from moe_serve.serving.locks import keys_lock
from moe_serve.serving.variants import HEADER, VARIANTS

FILE: Final = "keys.json"
KEY_HEADER: Final = "x-moe-serve-key"
"""Set by the proxy to the name of the request's key; what clients send under it is removed."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One client's key."""

    name: str
    sha256: str
    """Of the key, in hexadecimal. Keys are 256 random bits: nothing to guess, nothing to salt."""
    variant: str = ""
    """The variant that answers it always; empty: as the split says."""
    pin: bool = True
    """Whether it may choose a variant by header."""
    requests_per_minute: int = 0
    """0: no limit."""


def load_keys(state: Path) -> list[Key] | None:
    """All keys; ``None`` where there is no file, and then no key is asked for.

    An empty list lets nobody in: removing the last key must not open the door.

    Raises:
        UsageError: the file is not ours.
    """
    path = state / FILE
    if not path.exists():
        return None
    try:
        keys = [Key(**entry) for entry in read_json(path)["keys"]]
    except (KeyError, TypeError) as exc:
        raise _damaged(path) from exc
    for key in keys:
        sound = (
            isinstance(key.name, str)
            and _NAME.fullmatch(key.name)
            and isinstance(key.sha256, str)
            and _HASH.fullmatch(key.sha256)
            and key.variant in {"", *VARIANTS}
            and isinstance(key.pin, bool)
            and type(key.requests_per_minute) is int
            and key.requests_per_minute >= 0
        )
        if not sound:
            raise _damaged(path)
    return keys


def _damaged(path: Path) -> UsageError:
    return UsageError(
        "is not a file of API keys", where=str(path), remedy="moe-serve keys writes it; restore it"
    )


def save_keys(state: Path, keys: list[Key]) -> None:
    """Replace the file atomically.

    Raises:
        OutputError: it can't be written; the old one stays.
    """
    state.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    write_atomic(state / FILE, content.encode(), mode=0o600)


def new_key(
    state: Path, name: str, *, variant: str = "", pin: bool = True, requests_per_minute: int = 0
) -> str:
    """Add a key and return it: the only time that it is seen.

    Raises:
        UsageError: the name is taken or not a name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a name for a key",
            remedy="use small letters, digits, dot, dash and underscore",
            where="moe-serve keys",
        )
    secret = f"ms-{secrets.token_urlsafe(32)}"
    key = Key(
        name=name,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        variant=variant,
        pin=pin,
        requests_per_minute=requests_per_minute,
    )
    with keys_lock(state):
        keys = load_keys(state) or []
        if any(key.name == name for key in keys):
            raise UsageError(
                f"there is a key {name!r} already",
                remedy=f"moe-serve keys remove {name}, or rename",
                where=str(state),
            )
        save_keys(state, [*keys, key])
    return secret


def remove_key(state: Path, name: str) -> None:
    """Forget a key.

    Raises:
        UsageError: there is none of this name.
    """
    with keys_lock(state):
        keys = load_keys(state) or []
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise UsageError(
                f"there is no key {name!r}", remedy="moe-serve keys list", where=str(state)
            )
        save_keys(state, left)


def filters(
    keys: list[Key] | None, *, salt: str, pin_allowed: bool, requests_per_second: int
) -> list[dict[str, Any]]:
    """Envoy's HTTP filters that know clients apart and hold them to their limits.

    Args:
        keys: who may come in; ``None``: everybody.
        salt: hexadecimal, of the hashes by which users are counted.
        pin_allowed: whether a header may choose the variant at all.
        requests_per_second: of all clients without a limit of their own, together; 0: no limit.
    """
    kind = "type.googleapis.com/envoy.extensions.filters.http"
    found: list[dict[str, Any]] = [
        {
            "name": "envoy.filters.http.lua",
            "typed_config": {
                "@type": f"{kind}.lua.v3.Lua",
                "default_source_code": {
                    "inline_string": _script(keys, salt, pin_allowed=pin_allowed)
                },
            },
        }
    ]
    limited = [key for key in keys or () if key.requests_per_minute]
    if limited or requests_per_second:
        found.append(
            {
                "name": "envoy.filters.http.local_ratelimit",
                "typed_config": {
                    "@type": f"{kind}.local_ratelimit.v3.LocalRateLimit",
                    "stat_prefix": "keys",
                    "filter_enabled": _ALWAYS,
                    "filter_enforced": _ALWAYS,
                    "token_bucket": _bucket(requests_per_second or _UNLIMITED, "1s"),
                    "always_consume_default_token_bucket": False,
                    "rate_limits": [{"actions": [_BY_KEY]}],
                    "descriptors": [
                        {
                            "entries": [{"key": "key", "value": key.name}],
                            "token_bucket": _bucket(key.requests_per_minute, "60s"),
                        }
                        for key in limited
                    ],
                },
            }
        )
    return found


_UNLIMITED: Final = 1_000_000
_ALWAYS: Final = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
_BY_KEY: Final = {"request_headers": {"header_name": KEY_HEADER, "descriptor_key": "key"}}


def _bucket(tokens: int, interval: str) -> dict[str, Any]:
    return {"max_tokens": tokens, "tokens_per_fill": tokens, "fill_interval": interval}


def _script(keys: list[Key] | None, salt: str, *, pin_allowed: bool) -> str:
    """The Lua filter with the table of keys in it; names and hashes hold no quote (checked)."""
    rows = [_row(key) for key in keys or ()]
    text = files("moe_serve.serving").joinpath("keys.lua").read_text(encoding="utf-8")
    for mark, value in {
        "@KEYS@": "{\n" + ",\n".join(rows) + "\n}",
        "@REQUIRED@": _lua(keys is not None),
        "@SALT@": salt,
        "@PIN_ALLOWED@": _lua(pin_allowed),
        "@KEY_HEADER@": KEY_HEADER,
        "@PIN_HEADER@": HEADER,
    }.items():
        text = text.replace(mark, value)
    return text


def _row(key: Key) -> str:
    variant = f'"{key.variant}"' if key.variant else "nil"
    return f'["{key.sha256}"] = {{name = "{key.name}", pin = {_lua(key.pin)}, variant = {variant}}}'


def _lua(value: bool) -> str:
    return "true" if value else "false"
