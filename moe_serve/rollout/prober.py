"""Asks the probes, one at a time and seldom enough that users don't notice.

A thread of the control process. Between two probes lies the policy's interval; there is never more
than one in flight. They carry vLLM's lowest priority, which an engine heeds that was started with
``--scheduling-policy priority``; and while requests wait in an engine they give way, nine times out
of ten.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Final

import httpx

from moe_serve.errors import RolloutError, UsageError
from moe_serve.rollout.policy import Policy, Probes
from moe_serve.rollout.probes import Probe, ProbeSet, load_probes
from moe_serve.rollout.probing import Engine, Heard, NoPriority, compare
from moe_serve.rollout.quality import BOUND, Quality
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

_PATIENCE: Final = 60.0
"""Seconds for one request."""
_QUIET: Final = 0.5
"""Seconds that a reading waits for a probe to end."""
_WAYS: Final = 9
"""Probes left out in a row because requests wait; one then goes, or nothing would ever be known."""

Tell = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Tally:
    """What probes added to an engine's own counters, to be taken off again: they are no users."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first token, of each request."""
    pace: list[float] = field(default_factory=list)
    """Seconds per token after the first."""
    truncated: int = 0
    empty: int = 0
    """Answers of one token."""

    def add(self, heard: Heard) -> None:
        """Two requests; the first asks for one token only."""
        self.first += heard.waits
        self.pace += (0.0, heard.pace)
        self.truncated += heard.truncated
        self.empty += 1 + (heard.generated <= 1)

    def counted(self, edges: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Metric → (events, requests), as :class:`ArmReading` has them."""
        number = float(len(self.first))
        found = {
            metric: (float(sum(v > edges[metric] for v in values)), number)
            for metric, values in (("ttft", self.first), ("tpot", self.pace))
            if metric in edges
        }
        shares = {"truncated": float(self.truncated), "empty": float(self.empty)}
        return found | {name: (value, number) for name, value in shares.items()}


class Prober:
    """Puts a set's probes to both engines until stopped."""

    def __init__(
        self,
        probes: ProbeSet,
        settings: Probes,
        engines: Mapping[str, Engine],
        tell: Tell,
        known: Quality | None = None,
    ) -> None:
        """Nothing is asked before :meth:`start` or :meth:`step`.

        Args:
            probes: the set.
            settings: of the policy.
            engines: variant → engine.
            tell: takes one line for the log.
            known: results of an earlier run on the same set, gone on with.
        """
        self._settings, self._engines, self._tell = settings, engines, tell
        fits = known is not None and known.digest == probes.digest
        self._probes = {probe.id: probe for probe in probes.probes}
        self._quality = (
            known
            if fits and known is not None
            else Quality(digest=probes.digest, domains=probes.domains)
        )
        self._tallies = {variant: Tally() for variant in VARIANTS}
        self._priority = dict.fromkeys(VARIANTS, True)
        self._crowded, self._gave_way = False, 0
        self._round: list[str] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._flight = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="prober")
        self._client = httpx.Client(timeout=_PATIENCE, trust_env=False)

    def start(self) -> None:
        """Begin in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End; a probe in flight is not waited for."""
        self._stop.set()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No probe in flight, so that engines' counters and :meth:`counted` are of one moment.

        One that hangs is not waited for: the reading is then off by its two requests, until the
        next one.
        """
        free = self._flight.acquire(timeout=_QUIET)
        try:
            yield
        finally:
            if free:
                self._flight.release()

    def quality(self) -> Quality:
        """The results so far; no later one changes what is returned."""
        with self._lock:
            found = copy(self._quality)
            found.results = dict(self._quality.results)
            return found

    def counted(self, variant: str, edges: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """What probes added to an engine's counters (see :meth:`Tally.counted`)."""
        with self._lock:
            return self._tallies[variant].counted(edges)

    def crowded(self, waiting: Mapping[str, float | None]) -> None:
        """Say how many requests wait in each engine."""
        self._crowded = any(waiting.values())

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except RolloutError as exc:
                self._trouble(str(exc))
            except Exception as exc:  # noqa: BLE001 - a thread that ends in silence asks nothing
                self._trouble(f"a probe went wrong ({type(exc).__name__})")
            self._stop.wait(self._settings.interval_seconds)
        self._client.close()

    def _trouble(self, line: str) -> None:
        with self._lock:
            told, self._quality.trouble = self._quality.trouble, line
        if line != told:
            self._tell(f"probes: {line}")

    def step(self) -> None:
        """Ask one probe of both engines.

        Raises:
            RolloutError: one of them gave no usable answer.
        """
        if self._crowded and self._gave_way < _WAYS:
            self._gave_way += 1
            return
        self._gave_way = 0
        probe = self._probes[self._next()]
        with self._flight:
            heard = {variant: self._ask(variant, probe) for variant in VARIANTS}
        result = compare(probe.domain, heard[ORIGINAL], heard[PRUNED], BOUND)
        with self._lock:
            self._quality.add(probe.id, result, time.time())

    def _ask(self, variant: str, probe: Probe) -> Heard:
        engine, s = self._engines[variant], self._settings
        priority = self._priority[variant]
        try:
            heard = engine.ask(self._client, probe, top=s.top, tokens=s.tokens, priority=priority)
        except NoPriority:
            self._priority[variant] = False
            heard = engine.ask(self._client, probe, top=s.top, tokens=s.tokens, priority=False)
        with self._lock:
            self._tallies[variant].add(heard)
        return heard

    def _next(self) -> str:
        """In random order: first those without an answer, then round after round."""
        if not self._round:
            left = [i for i in self._probes if i not in self._quality.results]
            self._round = left or list(self._probes)
            random.shuffle(self._round)
        return self._round.pop()


def prober_of(policy: Policy, stack: StackState, tell: Tell, known: Quality | None) -> Prober:
    """As a policy says, for a stack on this machine; not started.

    Raises:
        UsageError: the probes are not those that the rollout began with.
    """
    probes = load_probes(policy.probes)
    if policy.probes.sha256 not in ("", probes.digest):
        raise UsageError(
            "the probes are not those that the rollout began with",
            where=str(policy.probes.texts or "the package's probes"),
            remedy="put the file back, or roll back and start anew",
        )
    engines = {
        name: Engine(name=f"{name} engine", url=found.url, model=stack.served_model)
        for name, found in stack.engines.items()
    }
    # What was heard of other models says nothing of these.
    subject = "\n".join([probes.digest, *(stack.models()[name] for name in VARIANTS)])
    about = replace(probes, digest=hashlib.sha256(subject.encode()).hexdigest())
    return Prober(about, policy.probes, engines, tell, known)
