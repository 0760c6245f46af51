"""One GPU for both engines: the original sleeps while nothing is sent to it.

vLLM's sleep mode at level 1 moves an engine's weights into the machine's memory and gives its cache
up. Its endpoints exist in development mode only; engines listen on loopback, and the proxy lets
none of these paths through. What is sent to a sleeping engine waits there until it wakes, so the
order is: wake, then move traffic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from moe_serve.errors import RolloutError, UsageError
from moe_serve.serving.loopback import ask
from moe_serve.serving.routes import TOTAL, read_split
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED

ARGUMENTS: Final = ("--enable-sleep-mode",)
ENVIRONMENT: Final = {"VLLM_SERVER_DEV_MODE": "1", "MOE_SERVE_EXPERT_SELECTIONS": "0"}
"""Sleep mode, and no counting of experts: its counters lie in memory that an engine gives up when
it falls asleep, and the thread that reads them does not stop for that."""
UTILIZATION: Final = "--gpu-memory-utilization"
WAKE_SECONDS: Final = 120.0
"""Weights come back at gigabytes per second; longer means that something is wrong."""
USABLE: Final = 0.9
"""Of a GPU's memory, for both engines together."""
_LEAST: Final = 2 * 2**30
"""Bytes beside its weights that an engine can do something with."""
_ASK: Final = 2.0


def memory_shares(total: int, weights: Mapping[str, int]) -> dict[str, float]:
    """Each engine's ``--gpu-memory-utilization``: its weights, and half of what both leave.

    Both fit awake, side by side: a rollback can't fail for want of memory that the other has.

    Args:
        total: bytes of the GPU.
        weights: variant → bytes of its checkpoint.

    Raises:
        UsageError: they don't fit.
    """
    room = int(total * USABLE) - sum(weights.values())
    least = _LEAST * len(weights)
    if room < least:
        raise UsageError(
            f"{sum(weights.values()) / 2**30:.1f} GiB of weights leave {room / 2**30:.1f} GiB of "
            f"the GPU's {total / 2**30:.1f} GiB, {least / 2**30:.0f} GiB are the least",
            where="--share-gpu",
            remedy="prune more, or give each engine a GPU of its own by original_url, pruned_url",
        )
    return {name: (size + room / len(weights)) / total for name, size in weights.items()}


def is_sleeping(url: str) -> bool:
    """Whether an engine sleeps.

    Raises:
        RolloutError: it does not answer.
    """
    return bool(json.loads(_ask(url, "GET", "/is_sleeping", _ASK))["is_sleeping"])


def wake(url: str, seconds: float = WAKE_SECONDS) -> bool:
    """Wake an engine and wait until it serves; return whether it slept.

    Raises:
        RolloutError: it does not answer, or still sleeps after ``seconds``.
    """
    if not is_sleeping(url):
        return False
    until = time.monotonic() + seconds
    _ask(url, "POST", "/wake_up", seconds)
    while is_sleeping(url):
        if time.monotonic() > until:
            raise RolloutError(
                f"still sleeps after {seconds:g} s",
                where=url,
                remedy="look at the engine's log, or start it again",
            )
        time.sleep(0.05)
    return True


def send_to_sleep(url: str, seconds: float = WAKE_SECONDS) -> None:
    """Put an engine to sleep at level 1 once its running requests have ended.

    Raises:
        RolloutError: it does not answer, or refuses.
    """
    _ask(url, "POST", "/sleep?level=1&mode=wait", seconds)


def wake_original(stack: StackState) -> str | None:
    """Before traffic goes to the original: see that it is awake.

    Returns:
        What to warn of. The move goes on where the pruned engine is gone as well: then nobody is
        worse off.

    Raises:
        RolloutError: it did not wake, and the pruned engine serves; nothing should be moved.
    """
    if not stack.shares_gpu:
        return None
    try:
        wake(stack.engines[ORIGINAL].url)
    except RolloutError as exc:
        if answers(stack.engines[PRUNED].url):
            raise RolloutError(
                f"the original did not wake ({exc}); the pruned engine goes on serving",
                where="--share-gpu",
                remedy="see that the GPU's memory is free and try again; the log is "
                f"{stack.engines[ORIGINAL].log}",
            ) from exc
        return f"the original did not wake: {exc}"
    return None


def answers(url: str, path: str = "/health") -> bool:
    """Whether an engine, or another of our servers at its own path, says that it is well."""
    try:
        _ask(url, "GET", path, _ASK)
    except RolloutError:
        return False
    return True


@dataclass(kw_only=True)
class Rest:
    """Lets the original sleep once it has served nobody for a while; wakes it when it is needed.

    Needed is it where the route file sends it anything, by whomever it was written, and where the
    pruned engine is not well, whose requests the proxy then gives to the original.

    A move and a falling asleep can cross. Each looks at what the other does after its own step
    (here the route file, there whether the original sleeps), so one of the two wakes it again.
    """

    folder: Path
    """The stack's state directory."""
    stack: StackState
    quiet_seconds: float = 60.0
    """How long all traffic has to be on the pruned engine first; a rollback within is instant."""
    clock: Callable[[], float] = time.monotonic
    _since: float | None = field(default=None, init=False)

    def tend(self) -> str | None:
        """Do what is due; return it in words.

        Raises:
            RolloutError: the original does not answer, or did not wake.
        """
        url = self.stack.engines[ORIGINAL].url
        if self._needed():
            self._since = None
            return "original engine: awake again" if wake(url) else None
        if self._since is None:
            self._since = self.clock()
        if self.clock() - self._since < self.quiet_seconds or is_sleeping(url) or _busy(url):
            return None
        send_to_sleep(url)
        if self._needed():
            wake(url)
            return None
        return "original engine: asleep, its memory on the GPU is free"

    def _needed(self) -> bool:
        try:
            split = read_split(self.folder)
        except RolloutError:
            return True
        return split.pruned < TOTAL or not answers(self.stack.engines[PRUNED].url)


def _busy(url: str) -> bool:
    """Whether requests run or wait, from the engine's metrics."""
    counted = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    lines = _ask(url, "GET", "/metrics", _ASK).splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith(counted))


def _ask(url: str, method: str, path: str, seconds: float) -> str:
    return ask("the engine", urlsplit(url).netloc, method, path, seconds=seconds)
