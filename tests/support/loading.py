"""vLLM's models built and filled by their loaders, a process for each rank and no engine.

``python -m tests.support.loading MODEL RANK STAGES PORT ANSWER`` is one; :func:`load` runs all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_serve.families import rotates_slices
from moe_serve.serving.ports import free_port
from tests.support.engine import ENVIRONMENT


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What one stage holds after loading."""

    expert_bytes: int
    """Of its routed experts."""
    others: list[str]
    """Its parameters that belong to no layer."""
    same_anew: bool
    """Whether the model, given the tensors once more without its loader, holds the same."""


def load(model: Path, stages: int = 1) -> list[Filled]:
    """Load a compact checkpoint in so many pipeline stages.

    Raises:
        RuntimeError: a stage failed, with the end of what it said.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / f"{rank}.json" for rank in range(stages)]
        running = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.support.loading"),
                    *(str(model), str(rank), str(stages), str(port), str(answer)),
                ],
                env={**os.environ, **ENVIRONMENT, "VLLM_DIST_IDENT": str(port)},
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            for rank, answer in enumerate(answers)
        ]
        said = [process.communicate(timeout=600)[1] for process in running]
        if lacking := [
            text for answer, text in zip(answers, said, strict=True) if not answer.exists()
        ]:
            raise RuntimeError(f"a stage failed: {lacking[0][-4000:]}")
        return [Filled(**json.loads(answer.read_text())) for answer in answers]


def _fill(model: Path, rank: int, stages: int, port: int) -> Filled:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    compilation: Any = {"mode": 2, "backend": "eager"}
    options: dict[str, Any] = {}
    if rotates_slices(json.loads((model / "config.json").read_text())):
        compilation["custom_ops"] = ["all", "-rotary_embedding"]
        options["attention_backend"] = "CPU_MLA"
    given = EngineArgs(
        model=str(model),
        load_format="moe_serve",
        dtype="float32",
        pipeline_parallel_size=stages,
        skip_tokenizer_init=True,
        compilation_config=compilation,
        **options,
    ).create_engine_config()
    with set_current_vllm_config(given):
        address = f"tcp://127.0.0.1:{port}"
        parallel_state.init_distributed_environment(stages, rank, address, rank, "gloo")
        parallel_state.initialize_model_parallel(1, stages)
        with set_default_torch_dtype(torch.float32), torch.device("cpu"):
            built: Any = initialize_model(vllm_config=given)
        loader: Any = get_model_loader(given.load_config)
        loader.load_weights(built, given.model_config)
        before = {name: p.detach().clone() for name, p in built.named_parameters()}
        for parameter in built.parameters():
            parameter.data.fill_(torch.nan)
        built.load_weights(loader.get_all_weights(given.model_config, built))
    return Filled(
        expert_bytes=sum(
            p.numel() * p.element_size()
            for name, p in before.items()
            if name.endswith((".w13_weight", ".w2_weight"))
        ),
        others=sorted(name for name in before if ".layers." not in name),
        same_anew=all(p.equal(before[name]) for name, p in built.named_parameters()),
    )


if __name__ == "__main__":
    path, rank, stages, port, answer = sys.argv[1:]
    filled = _fill(Path(path), int(rank), int(stages), int(port))
    Path(answer).write_text(json.dumps(asdict(filled)))
