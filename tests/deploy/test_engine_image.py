"""The engine image holds all of the plugin and nothing else of ours."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy/engine/Dockerfile"
PROBE = """
import importlib.abc, sys
from importlib.metadata import distribution

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("moe_serve", "tests", "benchmarks"):
            raise ImportError(f"{name} is not in the image")

sys.meta_path.insert(0, Refuse())
points = {p.group: p for p in distribution("moe_serve_vllm").entry_points}
points["vllm.general_plugins"].load()()
points["vllm.stat_logger_plugins"].load()
import moe_serve_vllm, moe_serve_vllm.models as models, moe_serve_vllm.layers
from moe_serve_vllm.families import FAMILIES
from vllm import ModelRegistry
known = set(ModelRegistry.get_supported_archs())
assert known >= {f.architecture for f in FAMILIES}, "not all are registered"
getattr(models, FAMILIES[0].architecture)
print(moe_serve_vllm.__file__)
"""


def copied(recipe: str, image: Path) -> list[str]:
    """Do what each COPY says, as docker does; return the commands to run."""
    commands = []
    for line in recipe.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["COPY"]:
            *sources, target = words[1:]
            place = image / target.lstrip("/")
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, dirs_exist_ok=True)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif words[:1] == ["RUN"]:
            commands.append(line.removeprefix("RUN "))
    return commands


def test_the_plugin_works_from_the_image_alone(tmp_path: Path) -> None:
    """Every COPY and RUN is followed; then vLLM finds the plugin's entry points and loads them.

    An import of anything else of this repository fails there.
    """
    image, site = tmp_path / "image", tmp_path / "site"
    site.mkdir()
    for command in copied(RECIPE.read_text(), image):
        here = command.replace("/tmp/", f"{image}/tmp/").replace("python3", sys.executable)  # noqa: S108
        script = here.replace("install.py", f"install.py {site}")
        subprocess.run(["/bin/bash", "-ec", script], check=True, cwd=tmp_path)
    assert not list((image / "tmp").iterdir())
    assert sorted(p.name for p in site.iterdir()) == [
        "moe_serve_vllm",
        "moe_serve_vllm-0.dist-info",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "VLLM_LOGGING_LEVEL": "ERROR"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(site / "moe_serve_vllm/__init__.py")
