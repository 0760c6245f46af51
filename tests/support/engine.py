"""A real vLLM engine in a process of its own, asked for log-probabilities.

``python -m tests.support.engine REQUEST`` serves one request file; :func:`ask` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.families import rotates_slices

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine said about one prompt."""

    prompt: list[float | None]
    """Log-probability of each prompt token given those before it; the first has none."""
    tokens: list[int]
    """Greedily generated tokens."""
    generated: list[float]
    """Their log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one engine said."""

    answers: list[Answer]
    """One per prompt."""
    rank_bytes: list[int]
    """Memory of the routed experts' weights on each of its ranks."""

    @property
    def expert_bytes(self) -> int:
        """On all of them."""
        return sum(self.rank_bytes)


def ask(models: list[Path], prompts: list[list[int]], **engine: Any) -> list[Reply | str]:
    """Put the same prompts to several checkpoints, one engine after the other in one process.

    Returns:
        For each checkpoint the reply, or the message with which the engine refused it.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        answer = Path(folder) / "answer.json"
        environment = {**os.environ, **ENVIRONMENT, **engine.pop("environment", {})}
        body = {"models": [str(m) for m in models], "prompts": prompts, "engine": engine}
        request.write_text(json.dumps(body))
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.engine", str(request), str(answer)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            timeout=900,
            check=False,
        )
        if not answer.exists():
            raise RuntimeError(f"no answer, exit {done.returncode}: {done.stderr[-4000:]}")
        results = json.loads(answer.read_text())
    return [
        r
        if isinstance(r, str)
        else Reply(answers=[Answer(**a) for a in r["answers"]], rank_bytes=r["rank_bytes"])
        for r in results
    ]


def _serve(request: dict[str, Any]) -> list[Any]:
    import gc

    from vllm import LLM, SamplingParams

    results: list[Any] = []
    sampling = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=0, logprobs=0)
    for model in request["models"]:
        config = json.loads((Path(model) / "config.json").read_text())
        compact = "compact_experts" in config
        options: dict[str, Any] = {"load_format": "moe_serve"} if compact else {}
        options["enforce_eager"] = True
        if rotates_slices(config):
            options["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
            options["attention_backend"] = "CPU_MLA"
        llm = None
        try:
            llm = LLM(
                model=model,
                dtype="float32",
                max_model_len=256,
                max_num_batched_tokens=512,
                max_num_seqs=8,
                skip_tokenizer_init=True,
                **(options | request["engine"]),
            )
            prompts = [{"prompt_token_ids": p} for p in request["prompts"]]
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            results.append(
                {
                    "answers": [_answer(o) for o in outputs],
                    "rank_bytes": llm.apply_model(_expert_bytes),
                }
            )
        except Exception as exc:  # noqa: BLE001 - the refusal is what the caller asks for
            results.append(f"{type(exc).__name__}: {exc}")
        finally:
            _shut_down(llm)
            del llm
            gc.collect()
    return results


def _expert_bytes(model: Any) -> int:
    """Bytes of the fused expert weights that a model holds."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if name.endswith((".w13_weight", ".w2_weight"))
    )


def _answer(output: Any) -> dict[str, Any]:
    tokens = output.prompt_token_ids
    prompt = [
        None if entry is None else entry[token].logprob
        for entry, token in zip(output.prompt_logprobs, tokens, strict=True)
    ]
    done = output.outputs[0]
    generated = [entry[t].logprob for entry, t in zip(done.logprobs, done.token_ids, strict=True)]
    return {"prompt": prompt, "tokens": list(done.token_ids), "generated": generated}


def _shut_down(llm: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    body = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(_serve(body)))
