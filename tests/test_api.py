"""What programs import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_serve
from tests.support.models import make_model, write_texts


def test_every_name_is_there_and_documented() -> None:
    """And an unknown one is an ordinary error."""
    for name in moe_serve.__all__[1:]:
        assert getattr(moe_serve, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moe_serve.nonsense


def test_importing_the_package_is_light() -> None:
    """Rolling back waits for neither torch nor transformers."""
    code = "import moe_serve, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``docs/python.md``, word by word, on a tiny model."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    make_model(tmp_path / "model", "qwen3_moe")
    write_texts(tmp_path / "texts.jsonl")
    write_texts(tmp_path / "heldout.jsonl", seed=1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "docs/python.md", "exec"), names)  # noqa: S102 - it is what is tested
    assert (tmp_path / "pruned" / "moe_serve.json").exists()
    assert isinstance(names["quality"], moe_serve.Comparison)
