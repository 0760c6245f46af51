"""An upgrade under a process that runs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from benchmarks.fixtures import MODEL
from moe_serve.rollout.control import application
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.installed import Installed
from moe_serve.serving.routes import write_split
from tests.support.stacks import fake_stack


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of files like an installed package's."""
    folder = tmp_path / "package"
    (folder / "web" / "__pycache__").mkdir(parents=True)
    for name in ("page.py", "web/page.html", "web/__pycache__/page.pyc"):
        (folder / name).write_text("first")
    return folder


def test_the_same_is_the_same(package: Path) -> None:
    """What Python compiles meanwhile is no change."""
    installed = Installed(package)
    (package / "web/__pycache__/page.pyc").write_text("second")
    assert installed.changed() == ""


@pytest.mark.parametrize("how", ["longer", "touched", "gone", "new"])
def test_any_other_file_is_named(how: str, package: Path) -> None:
    """With the way out."""
    installed, file = Installed(package), package / "web/page.html"
    if how == "longer":
        file.write_text("second")
    elif how == "touched":
        os.utime(file, ns=(1, 1))
    elif how == "gone":
        file.unlink()
    else:
        file.with_name("page.new").write_text("")
    assert "web/page." in installed.changed()
    assert "restart moe-serve up" in installed.changed()


def test_what_breaks_then_is_said(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised, page, API and controller say why; without a change they say what."""
    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 3)
    installed = Installed(package)
    client = TestClient(
        application(tmp_path, installed=installed),
        base_url="http://localhost",
        raise_server_exceptions=False,
    )
    monkeypatch.setattr("moe_serve.rollout.view.look", _gone)
    lines: list[str] = []
    controller = Controller(tmp_path, lines.append, installed=installed)
    monkeypatch.setattr(controller, "tick", _gone)
    answers = [client.get("/api/status"), client.get("/")]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert all("ImportError" in answer.json()["error"]["message"] for answer in answers)
    (package / "page.py").write_text("second")
    answers = [client.get("/api/status"), client.get("/")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all("page.py" in answer.json()["error"]["message"] for answer in answers)
    stop = threading.Event()
    thread = threading.Thread(target=controller.run, args=(stop,))
    thread.start()
    while not lines:
        thread.join(0.05)
    stop.set()
    thread.join(60)
    assert "the installed package changed" in lines[0]


def _gone(*_: object) -> None:
    raise ImportError("cannot import name 'shown' from 'moe_serve.rollout'")
