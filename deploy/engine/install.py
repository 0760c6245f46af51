"""Put the plugin beside vLLM: ``python3 install.py [SITE_PACKAGES]``, without pip or a network.

It copies ``moe_serve_vllm``, which lies beside this file, and writes the metadata by which vLLM
finds it: the entry points of ``pyproject.toml`` that name the plugin.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Final

PACKAGE: Final = "moe_serve_vllm"


def main(arguments: list[str]) -> None:
    """Copy and write."""
    here = Path(__file__).parent
    site = Path(arguments[0] if arguments else sysconfig.get_path("purelib"))
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(here / PACKAGE, site / PACKAGE, dirs_exist_ok=True, ignore=ignore)
    groups = tomllib.loads((here / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = []
    for group, points in groups.items():
        lines.append(f"[{group}]")
        lines += [f"{n} = {target}" for n, target in points.items() if target.startswith(PACKAGE)]
    metadata = site / f"{PACKAGE}-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0\n")


if __name__ == "__main__":
    main(sys.argv[1:])
