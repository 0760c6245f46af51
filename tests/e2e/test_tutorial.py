"""The tutorial from the wheel alone: no checkout is importable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from moe_serve.serving.ports import free_port

ROOT: Final = Path(__file__).parents[2]
LIMIT: Final = 1500
"""Seconds, against hanging; it takes a few minutes."""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a venv that holds the built wheel; what it depends on lies beside."""
    bins = Path(sys.executable).parent
    subprocess.run(
        [ROOT / "scripts" / "build", tmp_path / "dist"],
        env=os.environ | {"MOE_SERVE_VENV": sys.prefix},
        capture_output=True,
        check=True,
    )
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    wheel = next((tmp_path / "dist").glob("*.whl"))
    install = [str(bins / "uv"), "pip", "install", "--offline", "--no-deps"]
    install += ["--python", str(python), str(wheel)]
    subprocess.run(install, capture_output=True, check=True)
    libraries = sysconfig.get_path("purelib")
    # A .pth adds a folder without reading the .pth files in it: the checkout stays out of sight.
    site = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "libraries.pth").write_text(libraries + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PATH"] = os.pathsep.join((str(venv / "bin"), os.environ["PATH"], str(bins)))
    return environment


def commands(page: Path) -> str:
    """The blocks that are to run, as one script on free ports; whatever happens, it ends ``up``."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"([^\n]*)\n```(sh|python)\n(.*?)```", text, re.DOTALL)
    lines = [
        f"python - <<'END'\n{body}END\n" if language == "python" else body
        for above, language, body in found
        if not above.startswith("<!-- not run")
    ]
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    script = re.sub(r"\b800[01]\b", lambda port: ports[port[0]], "".join(lines))
    return "set -euxo pipefail\ntrap 'kill ${!-} || true; wait' EXIT\n" + script


def test_the_tutorial_from_the_wheel(tmp_path: Path, installed: dict[str, str]) -> None:
    """Inspect, prune, verify, compare, report; serve, ask, move traffic, roll back, stop."""
    work = tmp_path / "work"
    (work / "benchmarks").mkdir(parents=True)
    (work / "benchmarks" / "fixtures").symlink_to(ROOT / "benchmarks" / "fixtures")
    # Both packages, and what vLLM is told to load, are the wheel's.
    code = (
        "import moe_serve, moe_serve_vllm as v; from importlib.metadata import entry_points as e;"
        "(plugin,) = e(group='vllm.general_plugins', name='moe_serve');"
        "print(moe_serve.__file__, v.__file__, plugin.dist.locate_file('.'))"
    )
    where = subprocess.run(
        ["python", "-c", code], env=installed, cwd=work, capture_output=True, text=True, check=True
    )
    assert where.stdout.count(str(tmp_path / "venv")) == 3

    script = commands(ROOT / "docs" / "tutorial.md")
    with subprocess.Popen(
        ["bash", "-c", script],
        env=installed,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            told, _ = shell.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGTERM)
            told, _ = shell.communicate()
    assert shell.returncode == 0, told[-5000:]
    assert "sound" in told
    assert "next: moe-serve compare benchmarks/fixtures/qwen3moe-7m tutorial/pruned" in told
    tutorial = work / "tutorial"
    assert (tutorial / "pruned" / "moe_serve.json").exists()
    for page in ("compare.html", "report.html"):
        assert "</html>" in (tutorial / page).read_text(encoding="utf-8")
    # The engine of a compact checkpoint can't have started without the plugin.
    answered = re.findall(r"^x-moe-serve-variant: (\w+)", told, re.MULTILINE)
    assert answered == ["original", "pruned"]
    assert "stopped" in told.splitlines()
