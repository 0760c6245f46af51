"""How all pages are rendered: strictly, and with whatever comes from files escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from moe_serve.report.catalogue import Catalogue


def templates(t: Catalogue, package: str = "moe_serve.report", **names: Any) -> Environment:
    """Templates of a package and those that pages share, with the sentences as ``t``."""
    packages = dict.fromkeys((package, "moe_serve.report"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"t": t, **names}
    return environment
