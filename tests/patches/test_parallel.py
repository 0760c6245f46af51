"""Blocks cut over two processes."""

from __future__ import annotations

from pathlib import Path

from moe_serve.checkpoint.header import read_header
from tests.patches.test_oracle import BOUND, off, prompts
from tests.support.engine import ask
from tests.support.models import make_model
from tests.support.references import reference_logprobs
from tests.support.twins import make_twins


def test_two_ranks_hold_half_of_each_block(tmp_path: Path) -> None:
    """Tensor parallelism of 2, experts of none to two blocks of 64 neurons, one dropped.

    Each rank keeps 32 neurons of every block, the log-probabilities are the twin's.
    """
    source = make_model(
        tmp_path / "source", "qwen3_moe", experts=5, width=128, num_key_value_heads=2
    )
    lists = [[0, 1], [], None, [2], [3, 1]]
    table = {layer: {"width": 64, "blocks": 4, "experts": lists} for layer in (0, 1)}
    dropped = make_twins(source, tmp_path / "compact", tmp_path / "tied", table)
    entries = read_header(tmp_path / "compact" / "model.safetensors")
    stored = sum(entry.size for entry in entries if ".experts." in entry.name)
    (answer,) = ask(
        [tmp_path / "compact"],
        prompts(),
        tensor_parallel_size=2,
        # The function that counts bytes goes to the ranks, which are ours.
        environment={
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )
    assert off(answer, reference_logprobs(tmp_path / "tied", prompts(), dropped)) <= 2 * BOUND
    assert not isinstance(answer, str)
    assert answer.expert_bytes == stored // 2
