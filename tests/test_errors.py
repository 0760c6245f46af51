"""Messages and exit codes."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve import errors
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import MoeServeError, PlanError, UsageError, located, require_positive


def test_a_message_has_place_fault_and_remedy() -> None:
    """In this order, on one line."""
    error = PlanError("is too small", where="--keep", remedy="keep more")
    assert str(error) == "--keep: is too small; keep more"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own


def test_every_error_says_what_where_and_what_to_do() -> None:
    """At each place of the package that raises one; a layer's arithmetic is told its place."""
    kinds = {
        k for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, MoeServeError)
    }
    package = Path(errors.__file__).parent
    told = {package / "calibration" / name for name in ("gradients.py", "statistics.py")}
    told.add(package / "pruning" / "fitting" / "refit.py")
    short = []
    for path in sorted(package.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                continue
            wanted = {"remedy"} if path in told else {"where", "remedy"}
            if call.func.id in kinds and not wanted <= {k.arg for k in call.keywords}:
                short.append(f"{path.name}:{call.lineno}")
    assert short == []


def test_a_place_is_added_where_none_was_named() -> None:
    """And one that was named stays."""
    with pytest.raises(PlanError, match=r"^layer 3: too small; keep more$"), located("layer 3"):
        raise PlanError("too small", remedy="keep more")
    with pytest.raises(PlanError, match=r"^--keep: too small$"), located("layer 3"):
        raise PlanError("too small", where="--keep")


def test_the_bound_that_is_wrong_is_named_with_its_value() -> None:
    """One that was left out is none, and the least is allowed."""
    require_positive({"--limit": None, "--tokens": 1})
    require_positive({"--length": 2}, least=2)
    with pytest.raises(UsageError, match=r"^--tokens: is 0; give 1 or more$"):
        require_positive({"--limit": 3, "--tokens": 0})
    with pytest.raises(UsageError, match=r"^--length: is 1; give 2 or more$"):
        require_positive({"--length": 1}, least=2)


def test_of_two_models_the_wrong_one_is_named(tmp_path: Path) -> None:
    """A file of it is not place enough; a folder is not said twice."""
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(MoeServeError, match=rf"^{tmp_path}: config\.json: model_type 'none'"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MoeServeError, match=rf"^{tmp_path}/config\.json: is not a JSON object"):
        open_checkpoint(tmp_path)


def test_errors_become_exit_codes(tmp_path: Path) -> None:
    """Exit 2, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "moe_serve", "inspect", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error:" in done.stderr
    assert "give the folder that holds config.json" in done.stderr


def test_rolling_back_does_not_import_torch() -> None:
    """The fastest command must not wait for the slowest library."""
    code = (
        "import sys; import moe_serve.cli.app, moe_serve.cli.rollout; "
        "heavy = {'torch', 'transformers', 'vllm', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_demo_says_where_its_model_is(tmp_path: Path) -> None:
    """A package that was installed holds none."""
    command = [sys.executable, "-m", "moe_serve", "demo", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run scripts/demo in a checkout" in " ".join(done.stderr.split())
