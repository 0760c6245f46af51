"""Every benchmark that ``docs/benchmarks.md`` shows: ``python -m benchmarks.suite [NAME...]``.

Runs them one after the other, keeps what each printed with machine and date in
``benchmarks/results``, and writes the page from that. ``--page`` only writes the page, ``--list``
says what there is. All of them take some hours on two cores; leave the machine to them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import psutil

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.serving.ports import free_port

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).with_name("results")
PAGE: Final = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One section of the page."""

    title: str
    about: str
    module: str
    arguments: tuple[str, ...] = ()
    stack: Literal["", "fixture", "wide"] = ""
    """Model of the running stack whose state directory it wants: the fixture, or a random one so
    wide that an answer takes longer to compute than to deliver."""

    @property
    def command(self) -> str:
        """As a reader types it."""
        words = ["python", "-m", self.module, *self.arguments]
        return " ".join([*words, *(("--state", "STATE") if self.stack else ())])


_BEST: Final = ("--methods", "auto", "block-heapr", "drop-naee", "drop-reap")
"""Ours, and the published rules that come out best."""
SUITE: Final = {
    "quality": Benchmark(
        title="Quality against published rules",
        about="KL against the original on texts that calibration never saw, nats per token, at "
        "equal bytes of experts; every rule is calibrated on the same tokens. Less is better. The "
        "published rules that come out best, as published and with our re-fit added, over five "
        "draws of the calibration texts.",
        module="benchmarks.quality.methods",
        arguments=(
            *_BEST,
            *("--seeds", "5", "--heldout-tokens", "4096"),
        ),
    ),
    "peers": Benchmark(
        title="Every published rule",
        about="The same for all rules in the box, one draw.",
        module="benchmarks.quality.methods",
        arguments=("--heldout-tokens", "4096"),
    ),
    "router": Benchmark(
        title="Quality on another kind of router",
        about="The rules of the first section on a DeepSeek-V3 of 6.6 million weights: sigmoid "
        "scores with a selection bias, four groups of experts of which two are selected from, a "
        "shared expert, a dense layer. Trained on half as many tokens as the fixture, by `python "
        "-m benchmarks.fixtures.build --model deepseekv3-7m --tokens 6000000`, half an hour of one "
        "core.",
        module="benchmarks.quality.methods",
        arguments=(
            *("--model", "build/fixtures/deepseekv3-7m"),
            *_BEST,
            *("--seeds", "3", "--heldout-tokens", "4096"),
        ),
    ),
    "native": Benchmark(
        title="Quality of stock-loadable output",
        about="The same for checkpoints that need no plugin, beside rules that drop whole experts.",
        module="benchmarks.quality.native",
    ),
    "number-formats": Benchmark(
        title="Quality of quantised models",
        about="Tiles kept byte for byte, re-fitted, or neurons chosen freely and rounded again.",
        module="benchmarks.quality.number_formats",
        arguments=("--tokens", "2048"),
    ),
    "time": Benchmark(
        title="Time of pruning",
        about="Beside a plain forward pass over the same tokens plus reading and writing the files "
        "once: what no method can do without. Processor seconds do not feel the neighbours.",
        module="benchmarks.pruning.time",
        arguments=("--methods", "drop-reap", "block-heapr", "block-obs", "auto"),
    ),
    "memory": Benchmark(
        title="Memory of pruning",
        about="Peak resident memory as models grow deeper at one size of layer, and what the dry "
        "run said of memory and time.",
        module="benchmarks.pruning.memory",
        arguments=("--layers", "4", "12", "--method", "block-obs", "--tokens", "512"),
    ),
    "paper": Benchmark(
        title="Large models on paper",
        about="Formulas on the sizes of published configurations. Nothing here is measured.",
        module="benchmarks.pruning.paper",
    ),
    "overhead": Benchmark(
        title="What blocks cost an engine",
        about="Tokens per second of a compact checkpoint against the reference named in its row; "
        "the last row is chance.",
        module="benchmarks.serving.overhead",
    ),
    "load": Benchmark(
        title="What loading costs",
        about="Time and memory of the checked loader beside stock's on the tied twin.",
        module="benchmarks.serving.load",
    ),
    "soak": Benchmark(
        title="Half an hour of mixed load",
        about="The same short, long, chat, sampled, streamed, cancelled, abandoned and malformed "
        "requests to a compact engine and to stock vLLM with the tied twin.",
        module="benchmarks.serving.soak",
        arguments=("--minutes", "30"),
    ),
    "proxy": Benchmark(
        title="What Envoy adds",
        about="The stack's own configuration with one API key, before a stub that answers at once.",
        module="benchmarks.serving.proxy",
    ),
    "rollback": Benchmark(
        title="How fast a rollback is",
        about="Sixteen streams in flight, all traffic at the pruned variant, then the command.",
        module="benchmarks.rollout.rollback",
        arguments=("--trials", "20"),
        stack="fixture",
    ),
    "figures": Benchmark(
        title="Whether the dashboards tell the truth",
        about="Clients ask one variant, then the other, and write down what they meet while a "
        "real Prometheus scrapes with the rules in `deploy/`; then each recorded series beside the "
        "same figure from their log. A quantile of a histogram is interpolated between its edges, "
        "so the log's is taken from the same edges; the exact one stands beside it. The model is "
        "random and wide enough that an answer takes longer to compute than to deliver: latencies "
        "are the engines' own, and what clients meet beyond is the proxy, the way, and waiting for "
        "a processor, some ten milliseconds here.",
        module="benchmarks.rollout.figures",
        stack="wide",
    ),
    "scrape": Benchmark(
        title="What a scrape costs",
        about="`/metrics` of the control process with a rollout under way, two engines of 200 "
        "series behind it and the real Envoy, over a kept connection; beside it what the engines' "
        "pages take without it, which says how busy the machine was.",
        module="benchmarks.rollout.scrape",
    ),
    "probing": Benchmark(
        title="What probes cost users",
        about="One engine gets the probes of both variants, twice what either would get; blocks "
        "with probes and without alternate. Times with over times without, 95 % intervals.",
        module="benchmarks.rollout.probing",
        arguments=("--pairs", "8", "--seconds", "15"),
    ),
    "simulation": Benchmark(
        title="How often the default policy errs",
        about="Made-up traffic with a daily wave and bursts; beside the policy a usual one of "
        "fixed thresholds. A healthy model that is rolled back is a false alarm.",
        module="benchmarks.rollout.simulate",
        arguments=("--others", "300"),
    ),
    "mutation": Benchmark(
        title="How many planted faults the tests see",
        about="mutmut changes one sign, bound, constant or argument at a time in the pure parts of "
        "pruner, rollout and plugin; a sample of all such changes, and what the tests that reach "
        "the line make of it.",
        module="benchmarks.mutation",
        arguments=("--sample", "160", "--seed", "4"),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run came to."""

    command: str
    machine: str
    date: str
    seconds: int | None
    """That it took, where that was noted."""
    output: str
    """Markdown, as printed."""


def main() -> int:
    """Run what is named, or all; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all when left out")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(SUITE)):
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(SUITE)}")
    if options.list:
        for name, one in SUITE.items():
            print(f"{name}: {one.command}")
        return 0
    failed = False
    for name in () if options.page else options.names or SUITE:
        print(f"{name}: {SUITE[name].command}", file=sys.stderr, flush=True)
        try:
            keep(name, run(SUITE[name]))
        except subprocess.CalledProcessError as exc:
            # What it measured is worth reading even where a bar was missed.
            found = f"{exc.stdout or ''}\n{name}: exit code {exc.returncode}; not kept"
            print(found.lstrip(), file=sys.stderr, flush=True)
            failed = True
    PAGE.write_text(page(), encoding="utf-8")
    return int(failed)


def run(one: Benchmark) -> Result:
    """In a process of its own; its progress stays on stderr.

    Raises:
        CalledProcessError: it failed.
    """
    machine, date, began = described(), time.strftime("%Y-%m-%d"), time.monotonic()
    with stack(one.stack) if one.stack else contextlib.nullcontext() as state:
        more = ("--state", str(state)) if state else ()
        done = subprocess.run(
            [sys.executable, "-m", one.module, *one.arguments, *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return Result(
        command=one.command,
        machine=machine,
        date=date,
        seconds=round(time.monotonic() - began),
        output=done.stdout.strip(),
    )


def described() -> str:
    """This machine, and how busy it is at the moment."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), model
        )
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().total / 2**30
    return f"{cores} cores ({model}), {memory:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start"


@contextlib.contextmanager
def stack(kind: Literal["fixture", "wide"]) -> Iterator[Path]:
    """A model pruned to half, both variants served, until left."""
    program = [sys.executable, "-m", "moe_serve"]
    with tempfile.TemporaryDirectory() as folder:
        state, pruned = Path(folder) / "state", Path(folder) / "pruned"
        model = MODEL if kind == "fixture" else make_wide(Path(folder) / "wide")
        pruning = [*program, "prune", str(model), str(pruned), "--keep", "0.5"]
        pruning += ["--method", "block-obs", "--calibration", str(CALIBRATION), "--tokens", "1024"]
        subprocess.run(pruning, stdout=sys.stderr, check=True)
        settings = {
            "original": str(model),
            "pruned": str(pruned),
            "state": str(state),
            "port": free_port(),
            "control_port": free_port(),
            # A busy machine takes its time.
            "ready_seconds": 3600,
        }
        config = Path(folder) / "stack.toml"
        # Texts and whole numbers are written the same way in TOML.
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        serving = [*program, "up", str(config), "--json"]
        # Some panels are about the experts that traffic selects.
        watched = {**os.environ, "MOE_SERVE_EXPERT_SELECTIONS": "1"}
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True, env=watched) as up:
            try:
                if up.stdout is None or not up.stdout.readline():
                    raise subprocess.CalledProcessError(up.wait(), serving)
                yield state
            finally:
                up.terminate()


def make_wide(path: Path) -> Path:
    """Four hundred million random weights, a token for every byte."""
    import torch

    from benchmarks.serving.overhead import make_original

    return make_original(path, torch.bfloat16, hidden=1024, width=512, layers=16)


def keep(name: str, result: Result) -> None:
    """Write one result."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def page() -> str:
    """The documentation's page, from the results that are there."""
    parts = [
        "<!-- Written by `python -m benchmarks.suite --page` from benchmarks/results. -->\n",
        "# Benchmarks\n",
        "Each with its command, machine and date. `python -m benchmarks.suite` runs all of them",
        "and writes this page; `python -m benchmarks.suite NAME` one. The model is the trained",
        "fixture of this repository unless a section says otherwise.\n",
    ]
    for name, one in SUITE.items():
        parts.append(f"## {one.title}\n\n{one.about}\n")
        path = RESULTS / f"{name}.json"
        if not path.exists():
            parts.append(f"`{one.command}` has not been run for this page.\n")
            continue
        found = Result(**json.loads(path.read_text(encoding="utf-8")))
        took = "" if found.seconds is None else f"; {found.seconds} s"
        parts.append(f"`{found.command}`, {found.date}, {found.machine}{took}.\n")
        parts.append(f"{shown(found.output)}\n")
    return "\n".join(parts)


def shown(output: str) -> str:
    """Tables as they are; objects line by line as a table; another object as such."""
    if not output.startswith("{"):
        return output
    try:
        rows = [json.loads(line) for line in output.splitlines()]
    except json.JSONDecodeError:
        return f"```json\n{output}\n```"
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {' | '.join(_cell(row[key]) for key in head)} |" for row in rows if list(row) == head
    ]
    others = [f"`{json.dumps(row)}`" for row in rows if list(row) != head]
    return "\n".join([*lines, *("", *others)]).rstrip()


def _cell(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
