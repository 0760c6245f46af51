"""One real vLLM engine that is asked several things, in a process of its own.

``python -m tests.support.session REQUEST ANSWER`` serves one request file; :func:`ask_one` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engine import ENVIRONMENT


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One call of the engine."""

    prompts: list[list[int]]
    sampling: dict[str, Any] = field(default_factory=dict)
    regex: str | None = None
    """What the answer has to match."""
    adapter: str | None = None
    """Directory of a LoRA adapter."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What it said about one prompt."""

    prompt: list[float]
    """Log-probabilities of the prompt's tokens but the first; empty where not asked for."""
    tokens: list[int]
    generated: list[float]
    text: str
    cached: int
    """Tokens of the prompt whose keys and values were there already."""


def ask_one(model: Path, asks: list[Ask], **engine: Any) -> list[list[Told]]:
    """Start an engine with these options and ask it one thing after the other."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        body = {"model": str(model), "asks": [asdict(ask) for ask in asks], "engine": engine}
        request.write_text(json.dumps(body))
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.session", str(request), str(answer)],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            timeout=900,
            check=False,
        )
        if not answer.exists():
            raise RuntimeError(f"no answer, exit {done.returncode}: {done.stderr[-4000:]}")
        replies = json.loads(answer.read_text())
    return [[Told(**told) for told in reply] for reply in replies]


def _serve(request: dict[str, Any]) -> list[Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        model=request["model"],
        load_format="moe_serve",
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        **request["engine"],
    )
    replies = []
    for ask in request["asks"]:
        regex = ask["regex"]
        sampling = SamplingParams(
            temperature=0.0,
            logprobs=0,
            structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
            **ask["sampling"],
        )
        adapter = LoRARequest("adapter", 1, ask["adapter"]) if ask["adapter"] else None
        prompts = [{"prompt_token_ids": p} for p in ask["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
        replies.append([_told(output) for output in outputs])
    return replies


def _told(output: Any) -> dict[str, Any]:
    done = output.outputs[0]
    places = output.prompt_logprobs or [None]
    return {
        "prompt": [
            place[token].logprob
            for place, token in zip(places[1:], output.prompt_token_ids[1:], strict=False)
        ],
        "tokens": list(done.token_ids),
        "generated": [
            place[token].logprob for place, token in zip(done.logprobs, done.token_ids, strict=True)
        ],
        "text": done.text,
        "cached": output.num_cached_tokens or 0,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_serve(json.loads(Path(sys.argv[1]).read_text()))))
