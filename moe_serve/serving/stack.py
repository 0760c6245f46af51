"""Bringing a whole stack up on this machine, watching it, and draining it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

from moe_serve.errors import RolloutError, ServingError
from moe_serve.files import write_atomic
from moe_serve.metrics.memory import read_gpus
from moe_serve.serving import envoy
from moe_serve.serving.config import StackConfig
from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready, require_servable
from moe_serve.serving.identity import identity
from moe_serve.serving.listener import put_listener
from moe_serve.serving.locks import hold_stack
from moe_serve.serving.ports import free_port, port_is_free
from moe_serve.serving.process import Child, start
from moe_serve.serving.routes import (
    TOTAL,
    new_split,
    put_split,
    read_split,
    route_file,
    write_split,
)
from moe_serve.serving.routing import http_route_of
from moe_serve.serving.sharing import UTILIZATION, answers, memory_shares
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.token import make_token
from moe_serve.serving.variants import ORIGINAL, VARIANTS

_POLL: Final = 0.25
_STOP_GRACE: Final = 15.0
_CONTROL: Final = "moe_serve.rollout.control"
_REVIVAL_PAUSE: Final = 10.0
"""Seconds between two attempts to have a control process."""

Tell = Callable[[str], None]


@dataclass(kw_only=True)
class Stack:
    """The processes of a running stack."""

    config: StackConfig
    folder: Path
    state: StackState | None = None
    children: list[Child] = field(default_factory=list)
    lock: IO[str] | None = None
    """Open as long as the state directory is this one's."""
    _revived: float = -math.inf

    @property
    def proxy(self) -> Child | None:
        """Envoy."""
        return next((c for c in self.children if c.name == "envoy"), None)

    def ended(self) -> list[Child]:
        """Children that are no longer running."""
        return [c for c in self.children if c.exit_code is not None]

    def revive(self, tell: Tell) -> bool:
        """Start the control process again where it has ended; whether it was.

        Traffic never waited for it, and it goes on from the record: without it nobody decides. The
        others are not started again: an engine's end may be the pruned model's doing, and what is
        left serves meanwhile.
        """
        ended = next((c for c in self.ended() if c.name == "control"), None)
        now = time.monotonic()
        if ended is None or now - self._revived < _REVIVAL_PAUSE:
            return False
        self._revived = now
        told = f"control ended with exit code {ended.exit_code}"
        try:
            again = start("control", _command(self), ended.log)
        except OSError as exc:
            # Out of memory, of files or of processes: serving goes on, and this passes.
            tell(f"{told}; cannot be started ({exc}); tried again in {_REVIVAL_PAUSE:g} s")
            return False
        self.children[self.children.index(ended)] = again
        tell(f"{told}; started again (log {ended.log})")
        return True

    def drain(self, tell: Tell) -> int:
        """Take no new connections, wait for running requests; return how many were cut off."""
        if self.state is None or self.proxy is None or self.proxy.exit_code is not None:
            return 0
        admin = envoy.Admin(self.state.admin)
        left = 0
        try:
            admin.drain()
            until = time.monotonic() + self.config.drain_seconds
            while (left := admin.active_requests()) and time.monotonic() < until:
                tell(f"draining: {left} requests in flight")
                time.sleep(_POLL)
        except RolloutError as exc:
            tell(f"cannot drain: {exc}")
        return left

    def stop(self) -> None:
        """End all children, the proxy first, then leave the state directory to others."""
        order = sorted(self.children, key=lambda c: c.name != "envoy")
        for child in order:
            child.stop(_STOP_GRACE)
        self.children.clear()
        if self.lock is not None:
            self.lock.close()


def bring_up(config: StackConfig, tell: Tell) -> Stack:
    """Start engines, Envoy and the control process, and wait until all serve.

    Raises:
        ServingError: another stack has the state directory, or a part did not start; it is named,
            with its last log lines, and all others are stopped.
    """
    folder = config.state.absolute()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    # Before anything in there is written: a running proxy would take it for its own.
    stack = Stack(config=config, folder=folder, lock=hold_stack(folder))
    try:
        _require_ports(config)
        engines = _engines(stack, tell)
        make_token(folder)
        stack.state = StackState(
            pid=os.getpid(),
            **_proxied(stack, engines, tell),
            control=config.control_url,
            served_model=config.served_model,
            engines=engines,
            policy=str(config.policy.absolute()) if config.policy is not None else None,
            shares_gpu=config.share_gpu,
        )
        stack.state.save(folder)
        _control(stack, tell)
    except BaseException:
        stack.stop()
        raise
    return stack


def _require_ports(config: StackConfig) -> None:
    ports = [("--control-port", config.control_host, config.control_port)]
    if config.http_route is None:
        ports.insert(0, ("--port", config.host, config.port))
    for name, host, port in ports:
        if not port_is_free(host, port):
            raise ServingError(
                f"port {port} is taken on {host}",
                where=name,
                remedy=f"end what listens there, or give another {name}",
            )


def _engines(stack: Stack, tell: Tell) -> dict[str, EngineState]:
    """Start the engines that do not run yet; return when all answer.

    Side by side, but on a shared GPU one after the other: each measures what memory is left.
    """
    config = stack.config
    gpu = has_gpu()
    shares = _shares(config)
    for variant in VARIANTS:
        if config.urls()[variant] is None:
            require_servable(config.models()[variant], gpu=gpu)
    engines: dict[str, EngineState] = {}
    started: list[tuple[EngineSpec, Child]] = []
    for variant in VARIANTS:
        model = config.models()[variant].absolute()
        weights = identity(model)
        if (url := config.urls()[variant]) is not None:
            engines[variant] = EngineState(url=url, model=str(model), weights=weights)
            continue
        log = stack.folder / "logs" / f"{variant}.log"
        log.unlink(missing_ok=True)
        spec = EngineSpec(
            variant=variant,
            model=config.models()[variant],
            served_model=config.served_model,
            port=free_port(),
            log=log,
            arguments=(*shares.get(variant, ()), *config.arguments(variant)),
            kv_cache_gib=config.kv_cache_gib,
            sleeps=config.share_gpu and variant == ORIGINAL,
        )
        child = spec.launch(gpu=gpu)
        stack.children.append(child)
        started.append((spec, child))
        engines[variant] = EngineState(
            url=spec.url, model=str(model), pid=child.pid, log=str(spec.log), weights=weights
        )
        tell(f"{variant} engine: starting (log {log})")
        if config.share_gpu:
            _await_started([(spec, child)], config.ready_seconds, tell)
    _await_started(started, config.ready_seconds, tell)
    _await_elsewhere(engines, config.ready_seconds, tell)
    return engines


def _shares(config: StackConfig) -> dict[str, tuple[str, ...]]:
    """On a shared GPU: each engine's part of the memory, unless the arguments have it.

    Raises:
        ServingError: there is no GPU.
        UsageError: the models don't fit.
    """
    if not config.share_gpu:
        return {}
    totals = [gpu.total for gpu in read_gpus()]
    if not totals:
        raise ServingError(
            "vLLM's sleep mode moves weights from a GPU to the machine's memory, and the NVIDIA "
            "driver shows no GPU here",
            where="--share-gpu",
            remedy="leave it out: on processors both engines just run side by side",
        )
    if any(a.startswith(UTILIZATION) for v in VARIANTS for a in config.arguments(v)):
        return {}
    files = {v: config.models()[v].glob("*.safetensors") for v in VARIANTS}
    weights = {v: sum(f.stat().st_size for f in found) for v, found in files.items()}
    shares = memory_shares(min(totals), weights)
    return {variant: (UTILIZATION, f"{share:.3f}") for variant, share in shares.items()}


def _await_started(started: list[tuple[EngineSpec, Child]], seconds: float, tell: Tell) -> None:
    """Until all answer, or one has ended."""
    began = time.monotonic()
    waiting = dict(started)
    while waiting:
        for spec, child in list(waiting.items()):
            if is_ready(spec, child):
                tell(f"{spec.variant} engine: ready after {time.monotonic() - began:.0f} s")
                del waiting[spec]
        if waiting and time.monotonic() - began > seconds:
            spec, child = next(iter(waiting.items()))
            raise ServingError(
                f"not ready after {seconds:g} s; its log ends:\n{child.tail()}\n",
                where=child.name,
                remedy=f"the whole log is {spec.log}; raise ready_seconds for a large model",
            )
        time.sleep(_POLL)


def _await_elsewhere(engines: dict[str, EngineState], seconds: float, tell: Tell) -> None:
    """Until engines that were not started here answer."""
    until = time.monotonic() + seconds
    for variant, engine in engines.items():
        if engine.pid is not None:
            continue
        tell(f"{variant} engine: waiting for {engine.url}")
        while not answers(engine.url):
            if time.monotonic() > until:
                raise ServingError(
                    f"does not answer after {seconds:g} s",
                    where=engine.url,
                    remedy=f"start it, or correct {variant}_url",
                )
            time.sleep(_POLL)


def _proxied(stack: Stack, engines: dict[str, EngineState], tell: Tell) -> dict[str, Any]:
    """What splits: our Envoy, or a route of the cluster's gateway; for ``stack.json``."""
    config = stack.config
    if config.http_route is None:
        admin_port = free_port()
        proxy = _envoy(stack, engines, admin_port)
        return {
            "endpoint": config.endpoint_url,
            "admin": f"127.0.0.1:{admin_port}",
            "envoy_pid": proxy.pid,
            "edge": config.edge(),
        }
    urls = {name: engine.url for name, engine in engines.items()}
    route = http_route_of(config.http_route, urls, restores=config.http_route_restores)
    split = route.read()
    # What is there once more, to learn now and not in an emergency whether we may.
    route.put(replace(split, version=split.version or new_split(0.0).version))
    tell(f"{route.where}: {split.percent:g} % pruned")
    return {
        "endpoint": route.where,
        "admin": "",
        "envoy_pid": 0,
        "http_route": config.http_route,
        "http_route_restores": config.http_route_restores,
    }


def _envoy(stack: Stack, engines: dict[str, EngineState], admin_port: int) -> Child:
    """Start the proxy with the split that is on disk, or everything on the original."""
    folder, config = stack.folder, stack.config
    if route_file(folder).exists():
        # The same split once more: the file may be of an older layout.
        split = read_split(folder)
        resting = config.share_gpu and split.pruned == TOTAL
        put_split(folder, replace(split, resting=resting))
    else:
        write_split(folder, 0.0)
    put_listener(folder, config.edge())
    bootstrap = envoy.bootstrap(
        folder,
        config.edge(),
        admin_port=admin_port,
        engines={
            variant: engine.url.removeprefix("http://") for variant, engine in engines.items()
        },
    )
    path = folder / "envoy.json"
    write_atomic(path, json.dumps(bootstrap, indent=1).encode())
    log = folder / "logs" / "envoy.log"
    log.unlink(missing_ok=True)
    child = start("envoy", [*envoy.command(path), "--concurrency", "2"], log)
    stack.children.append(child)
    _wait(child, lambda: envoy.Admin(f"127.0.0.1:{admin_port}").ready(), 30.0)
    return child


def _control(stack: Stack, tell: Tell) -> None:
    """Start the control process."""
    log = stack.folder / "logs" / "control.log"
    log.unlink(missing_ok=True)
    child = start("control", _command(stack), log)
    stack.children.append(child)
    _wait(child, lambda: answers(stack.config.control_url, "/healthz"), 60.0)
    tell("control: ready")


def _command(stack: Stack) -> list[str]:
    config = stack.config
    command = [sys.executable, "-m", _CONTROL, "--state", str(stack.folder)]
    command += ["--host", config.control_host, "--port", str(config.control_port)]
    for name in config.control_names:
        command += ["--name", name]
    return [*command, *(("--watch",) if config.policy is not None else ())]


def _wait(child: Child, ready: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if child.exit_code is not None or time.monotonic() > until:
            raise ServingError(
                f"did not start:\n{child.tail()}\n",
                where=child.name,
                remedy=f"the whole log is {child.log}",
            )
        time.sleep(0.1)
