"""The commands: where each is, what it does in a line, and how it is typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Entry:
    """One command or group of commands."""

    module: str
    """Of this package."""
    name: str
    """What it exports: a function or a group."""
    section: str
    """Of the help."""
    summary: str
    """Shown beside its name; listing commands must not import them."""


_OFFLINE: Final = "Prune, offline"
_LOOK: Final = "Check and explain"
_LIVE: Final = "Serve and roll out"

COMMANDS: Final = {
    "demo": Entry("demo", "demo_command", _OFFLINE, "all of it once, on a small trained model"),
    "inspect": Entry("inspect", "inspect_command", _OFFLINE, "what a checkpoint is, its bytes"),
    "prune": Entry("prune", "prune_command", _OFFLINE, "the whole offline run; resumes by itself"),
    "calibrate": Entry("calibrate", "calibrate_command", _OFFLINE, "its first step: observe"),
    "merge-statistics": Entry("calibrate", "merge_command", _OFFLINE, "add up shards of it"),
    "plan": Entry("prune", "plan_command", _OFFLINE, "its second step: decide"),
    "apply": Entry("prune", "apply_command", _OFFLINE, "its third step: build"),
    "export": Entry("files", "export_command", _OFFLINE, "a compact checkpoint in another format"),
    "pilot": Entry("pilot", "pilot_command", _OFFLINE, "several sizes measured, with advice"),
    "verify": Entry("files", "verify_command", _LOOK, "hashes, table, numbers of a checkpoint"),
    "compare": Entry("compare", "compare_command", _LOOK, "what pruning cost, domain by domain"),
    "report": Entry("report", "report_command", _LOOK, "a page on what became of every expert"),
    "audit": Entry("audit", "audit_command", _LOOK, "which texts were used, on whose terms"),
    "up": Entry("up", "up_command", _LIVE, "original and pruned behind one OpenAI port"),
    "rollout": Entry("rollout", "rollout", _LIVE, "move traffic, or let a policy do it; roll back"),
    "keys": Entry("keys", "keys", _LIVE, "who may use the port"),
}
"""In the order of a user's work."""

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "": (
        "moe-serve prune MODEL OUT --keep 0.5 --calibration texts.jsonl",
        "moe-serve compare MODEL OUT --texts heldout.jsonl",
        "moe-serve up --original MODEL --pruned OUT --state state",
        "moe-serve rollout set 10 --state state",
        "moe-serve rollout rollback --state state",
    ),
    "inspect": ("moe-serve inspect MODEL",),
    "prune": (
        "moe-serve prune MODEL OUT --keep 0.5 --calibration texts.jsonl",
        'moe-serve prune MODEL OUT --gpu "RTX 4090" --calibration texts.jsonl --dry-run',
        "moe-serve prune MODEL OUT --experts 8 --method merge-hc --calibration texts/",
        "moe-serve prune MODEL OUT --keep 0.75 --format native --calibration texts.jsonl",
    ),
    "calibrate": (
        "moe-serve calibrate MODEL statistics --calibration texts.jsonl",
        "moe-serve calibrate MODEL part-2 --calibration texts.jsonl --shard 2/4",
    ),
    "merge-statistics": ("moe-serve merge-statistics part-1 part-2 statistics",),
    "plan": ("moe-serve plan statistics plan.json --keep 0.5",),
    "apply": ("moe-serve apply MODEL plan.json OUT --calibration texts.jsonl",),
    "export": ("moe-serve export OUT TIED --format tied",),
    "verify": (
        "moe-serve verify OUT --original MODEL",
        "moe-serve verify OUT --engine",
    ),
    "audit": ("moe-serve audit OUT --original MODEL --texts texts.jsonl",),
    "compare": (
        "moe-serve compare MODEL OUT --texts heldout.jsonl --html compare.html",
        "moe-serve compare http://a:8000 http://b:8000 --texts heldout.jsonl",
    ),
    "report": ("moe-serve report OUT -o report.html --lang ja",),
    "pilot": ("moe-serve pilot --init", "moe-serve pilot pilot.toml"),
    "up": (
        "moe-serve up --original MODEL --pruned OUT --state state",
        "moe-serve up stack.toml --policy policy.toml",
    ),
    "keys": ("moe-serve keys add team-a --state state", "moe-serve keys list --state state"),
    "keys add": ("moe-serve keys add team-a --state state --requests-per-minute 600",),
    "keys remove": ("moe-serve keys remove team-a --state state",),
    "keys list": ("moe-serve keys list --state state",),
    "rollout": (
        "moe-serve rollout status --state state",
        "moe-serve rollout rollback --state state",
    ),
    "rollout status": ("moe-serve rollout status --state state --json",),
    "rollout start": ("moe-serve rollout start --state state --policy policy.toml",),
    "rollout set": ('moe-serve rollout set 10 --state state --reason "first users"',),
    "rollout pause": ('moe-serve rollout pause --state state --reason "weekend"',),
    "rollout resume": ("moe-serve rollout resume --state state",),
    "rollout promote": ("moe-serve rollout promote --state state",),
    "rollout rollback": ("moe-serve rollout rollback --state state",),
    "rollout history": ("moe-serve rollout history --state state --verify",),
    "rollout dependence": ("moe-serve rollout dependence --state state",),
    "rollout simulate": ("moe-serve rollout simulate policy.toml --rate 5 --rollouts 200",),
    "demo": ("moe-serve demo --output demo",),
}
"""Command → lines that its help ends with; the first one is the usual case."""
