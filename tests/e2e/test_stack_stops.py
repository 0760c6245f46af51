"""What ends while a stack runs: its control process, and the stack itself."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
from openai import OpenAI

from moe_serve.demo.clients import Load, client
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.running import Running

MARK = "A sentence that nobody else would write: zanzibar vermilion."
SAID = "its control process is gone"


def test_rollback_with_the_control_process_killed(stack: Running) -> None:
    """Sixteen streams in flight; the command works alone; nothing fails."""
    stack.rollout("set", "100")
    state = json.loads((Path(stack.info["state"]) / "stack.json").read_text())
    control = [
        p
        for p in psutil.Process(stack.process.pid).children(recursive=True)
        if "moe_serve.rollout.control" in " ".join(p.cmdline())
    ]
    assert control
    with Load(endpoint=stack.endpoint, model="fixture", streams=16, tokens=32) as load:
        load.phase = "before"
        time.sleep(2)
        for process in control:
            process.kill()
        moved = stack.rollout("rollback", "--reason", SAID)
        time.sleep(1)
        load.phase = "after"
        time.sleep(3)
    assert load.failed == 0
    assert load.outcomes["before", PRUNED] >= 16
    assert load.outcomes["after", PRUNED] == 0
    assert load.outcomes["after", ORIGINAL] > 0
    assert moved["effective_seconds"] < 0.1
    assert stack.rollout("history")["changes"][0]["decision"] == "rollback"
    assert state["pid"] == stack.process.pid


def test_sigterm_lets_streams_end(stack: Running, later: ExitStack) -> None:
    """Last of all that ask the stack: what was in flight is whole, nothing is left over."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    reasons: list[str | None] = []

    def stream(openai: OpenAI) -> None:
        answer = openai.completions.create(
            model="fixture",
            prompt=MARK,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reasons.append([c.choices[0].finish_reason for c in answer][-1])

    with client(stack.endpoint) as openai:
        threads = [threading.Thread(target=stream, args=(openai,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        stack.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
    assert reasons == ["length"] * 4
    assert stack.process.wait(90) == 0
    later.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    # Neither the token nor a prompt is in any log or record; that the files are read is shown by
    # what must be there.
    secret = stack.token["authorization"].removeprefix("Bearer ").encode()
    state = Path(stack.info["state"])
    files = [f for f in [*state.rglob("*"), state.parent / "up.log"] if f.is_file()]
    text = {f: f.read_bytes() for f in files if f != Path(stack.info["token_file"])}
    assert any(SAID.encode() in found for found in text.values())
    for word in (secret, MARK.encode(), b"zanzibar"):
        assert [f.name for f, found in text.items() if word in found] == []
