"""The command line as a whole: help, examples, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Final

import pytest
from typer.main import get_command

from moe_serve.cli.app import app
from moe_serve.cli.commands import COMMANDS, EXAMPLES
from tests.support.lines import parse

RUN: Final = "import sys; sys.argv[0] = 'moe-serve'; from moe_serve.cli.app import main; main()"


def every() -> dict[str, Any]:
    """Path → command, groups and their subcommands included."""
    root: Any = get_command(app)
    found: dict[str, Any] = {}
    for name in COMMANDS:
        command = root.get_command(None, name)
        found[name] = command
        found |= {f"{name} {n}": c for n, c in getattr(command, "commands", {}).items()}
    return found


def test_every_command_teaches() -> None:
    """Each help has a sentence, a sentence for each option, and examples that parse."""
    commands = every()
    assert set(commands) == set(EXAMPLES) - {""}
    for path, command in commands.items():
        assert command.help, path
        missing = [p.name for p in command.params if not getattr(p, "help", None)]
        assert missing == [], path
        assert EXAMPLES[path], path
    for path, lines in EXAMPLES.items():
        for line in lines:
            assert " ".join(parse(line)).startswith(path), line


@pytest.mark.parametrize("line", ["moe-serve prune A B --kepe 0.5", "moe-serve rollout set"])
def test_a_wrong_line_is_recognised(line: str) -> None:
    """Otherwise what checks the documentation would check nothing."""
    with pytest.raises(Exception, match=r"No such option|Missing parameter"):
        parse(line)


def help_of(*words: str) -> str:
    """What ``--help`` prints."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_ends_with_examples() -> None:
    """Line by line, not filled; the overview cuts no summary short."""
    overview = help_of()
    assert "..." not in overview.partition("Options:")[2]
    for entry in COMMANDS.values():
        assert entry.summary in overview
    assert '\n    moe-serve rollout set 10 --state state --reason "first users"\n' in help_of(
        "rollout", "set"
    )


def complete(*words: str) -> list[str]:
    """What a bash offers behind ``words``, the last of which is begun."""
    environment = os.environ | {
        "_MOE_SERVE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("moe-serve", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_values() -> None:
    """At every level."""
    assert complete("ro") == ["rollout"]
    assert complete("rollout", "p") == ["pause", "promote"]
    assert complete("rollout", "set", "--rea") == ["--reason"]
    assert complete("prune", "A", "B", "--method", "merge-h") == ["merge-hc"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_ask(shell: str) -> None:
    """A script that a profile can source, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=os.environ | {"_MOE_SERVE_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"complete_{shell}" in done.stdout
    assert done.stderr == ""


def test_listing_and_completing_commands_imports_none() -> None:
    """The overview is there at once."""
    code = (
        "import sys; from typer.main import get_command; from moe_serve.cli.app import app; "
        "root = get_command(app); ctx = root.make_context('moe-serve', ['rollout']); "
        "assert root.get_help(ctx) and len(root.shell_complete(ctx, '')) > 10; "
        "heavy = {'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_command_waits_for_transformers_to_explain_itself() -> None:
    """It takes seconds to import, and only reading a model's layers needs it."""
    code = (
        "import sys; from typer.main import get_command; from moe_serve.cli.app import app; "
        "from moe_serve.cli.commands import COMMANDS; "
        "root = get_command(app); ctx = root.make_context('moe-serve', ['rollout']); "
        "assert all(root.get_command(ctx, name) for name in COMMANDS); "
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
