"""Killing each part under load: ``python -m benchmarks.rollout.kills``.

The real Envoy, control process and Prometheus with the rules in ``deploy/``, and two engines that
stream without a model. Eight clients ask all the time, half of them go to pruned; then one part is
killed, and what fails, which alert fires when, and what the page says is written down. About two
minutes a part, since alerts wait on purpose.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from moe_serve.rollout.traffic import move
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import Child, start
from moe_serve.serving.token import make_token
from tests.support.prometheus import scraping
from tests.support.proxy import Proxied, proxied

PARTS: Final = ("pruned", "original", "envoy", "control", "prometheus")
INTERVAL: Final = 3.0
"""Seconds until the health check has taken a dead engine out: three in a row, one a second."""
_MODEL: Final = Path(__file__).parents[1] / "fixtures" / "qwen3moe-7m"
_BEFORE, _AFTER, _PATIENCE = 5.0, 20.0, 150.0


@dataclass
class Clients:
    """Ask one thing after the other until stopped."""

    url: str
    number: int = 8
    seen: list[tuple[float, str]] = field(default_factory=list)
    """(when it was sent, ``whole``, ``cut`` or ``failed``)."""

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While in it."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(stop,)) for _ in range(self.number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, stop: threading.Event) -> None:
        with httpx.Client(timeout=30.0) as client:
            while not stop.is_set():
                sent = time.monotonic()
                ended = self._one(client)
                self.seen.append((sent, ended))
                if ended == "failed":
                    # As a client that waits before it tries again.
                    stop.wait(0.1)

    def _one(self, client: httpx.Client) -> str:
        headers = False
        try:
            with client.stream("POST", f"{self.url}/completions", json={"stream": True}) as answer:
                if answer.status_code != 200:
                    return "failed"
                headers = True
                text = "".join(answer.iter_text())
        except httpx.HTTPError:
            return "cut" if headers else "failed"
        return "whole" if text.rstrip().endswith("[DONE]") else "cut"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one kill did."""

    requests: int
    failed: int
    cut: int
    later: int
    """Failed or cut, and sent after the health check's interval."""
    alert: str
    seconds: float | None
    page: str


@contextmanager
def control(proxy: Proxied, port: int) -> Iterator[Child]:
    """Its control process, once it answers."""
    make_token(proxy.state)
    command = [sys.executable, "-m", "moe_serve.rollout.control"]
    command += ["--state", str(proxy.state), "--port", str(port)]
    child = start("control", command, proxy.state / "control.log")
    try:
        _until(lambda: httpx.get(f"http://127.0.0.1:{port}/healthz").is_success, 120.0)
        yield child
    finally:
        child.stop(5)


def kill(part: str, folder: Path) -> Seen:
    """Bring everything up, kill one part under load, and watch."""
    port = free_port()
    page = f"http://127.0.0.1:{port}"
    state = folder / "state"
    state.mkdir()
    with (
        proxied(state, chunks=4, pause=0.02, model=_MODEL, served_model="fixture") as proxy,
        control(proxy, port) as controller,
        scraping(page, folder / "prometheus") as prometheus,
    ):
        move(proxy.state, 50, decision="set", reason="to be killed")
        clients = Clients(proxy.endpoint)
        with clients.asking():
            _until(lambda: bool(_query(prometheus, "moe_serve_requests_total")), 60.0)
            time.sleep(_BEFORE)
            if alerts := _firing(prometheus):
                raise SystemExit(f"firing before anything was killed: {alerts}")
            at = time.monotonic()
            {
                "pruned": proxy.pruned.die,
                "original": proxy.original.die,
                "envoy": lambda: os.kill(proxy.child.pid, signal.SIGKILL),
                "control": lambda: os.kill(controller.pid, signal.SIGKILL),
                "prometheus": lambda: os.kill(_listener(prometheus), signal.SIGKILL),
            }[part]()
            time.sleep(_AFTER)
        alert, seconds = "none", None
        if part != "prometheus":
            _until(lambda: bool(_firing(prometheus)), _PATIENCE)
            alert, seconds = ", ".join(_firing(prometheus)), time.monotonic() - at
        bad = [sent for sent, ended in clients.seen if ended != "whole"]
        return Seen(
            requests=len(clients.seen),
            failed=sum(ended == "failed" for _, ended in clients.seen),
            cut=sum(ended == "cut" for _, ended in clients.seen),
            later=sum(sent > at + INTERVAL for sent in bad),
            alert=alert,
            seconds=seconds,
            page=_says(page),
        )


def _listener(url: str) -> int:
    """The process that listens there."""
    import psutil

    port = int(url.rsplit(":", 1)[1])
    for child in psutil.Process().children():
        if any(c.laddr.port == port and c.status == "LISTEN" for c in child.net_connections()):
            return int(child.pid)
    raise SystemExit(f"nobody listens on {port}")


def _says(page: str) -> str:
    """What the page has to say about parts that do not answer."""
    try:
        html = httpx.get(page, timeout=10.0).text
    except httpx.HTTPError:
        return "no page"
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    found = re.findall(r"\w+ does not answer", words)
    return "; ".join(dict.fromkeys(f.strip() for f in found)) or "all as usual"


def _query(url: str, expression: str) -> list[object]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}).json()
    return list(answer["data"]["result"])


def _firing(url: str) -> list[str]:
    alerts = httpx.get(f"{url}/api/v1/alerts").json()["data"]["alerts"]
    return sorted({a["labels"]["alertname"] for a in alerts if a["state"] == "firing"})


def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(0.25)


def main() -> None:
    """Print a row per part; exit 1 when a request on a surviving path was lost late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    print(f"| killed | requests | failed | cut | sent later than {INTERVAL:g} s and lost |", end="")
    print(" alert, after | page |\n|---|---|---|---|---|---|---|")
    lost = 0
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            seen = kill(part, Path(folder))
        lost += seen.later if part != "envoy" else 0
        after = "" if seen.seconds is None else f", {seen.seconds:.0f} s"
        print(
            f"| {part} | {seen.requests:,} | {seen.failed} | {seen.cut} | {seen.later} | "
            f"{seen.alert}{after} | {seen.page} |",
            flush=True,
        )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
