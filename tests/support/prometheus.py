"""A real Prometheus that scrapes one stack, with our rules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from moe_serve.serving.ports import free_port
from moe_serve.serving.process import start
from tests.support.promql import PROMETHEUS


@contextmanager
def scraping(control: str, folder: Path, *, seconds: int = 1) -> Iterator[str]:
    """Start it on the configuration in ``deploy/``, aimed at ``control``; its address.

    Args:
        control: address of the control process.
        folder: for its files.
        seconds: between scrapes, and what a scrape may take.
    """
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{seconds}s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    for job in config["scrape_configs"]:
        for target in job["static_configs"]:
            target["targets"] = [urlsplit(control).netloc]
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={urlsplit(url).netloc}"),
    ]
    child = start("prometheus", command, folder / "log")
    try:
        until = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"{url}/-/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            assert time.monotonic() < until, child.tail()
            time.sleep(0.1)
        yield url
    finally:
        child.stop(5)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """An instant vector."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])
