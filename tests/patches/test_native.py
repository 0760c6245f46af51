"""Native in stock vLLM: no plugin, no table, the same numbers as in transformers."""

from __future__ import annotations

from pathlib import Path

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Silent
from moe_serve.pruning.request import Selection, TextOptions
from moe_serve.pruning.run import PruneRequest, prune
from tests.patches.test_oracle import BOUND, off, prompts
from tests.support.engine import ask
from tests.support.models import make_model, write_texts
from tests.support.references import reference_logprobs


def test_native_in_stock_vllm_equals_transformers(tmp_path: Path) -> None:
    """Experts dropped and narrowed: the engine holds no more bytes than the file."""
    model = make_model(tmp_path / "m", "qwen3_moe", width=96)
    out = tmp_path / "native"
    request = PruneRequest(
        model=model,
        output=out,
        texts=TextOptions(paths=(write_texts(tmp_path / "t.jsonl"),), tokens=1024, length=128),
        # 0.45 · 8 · 96 = 345 = 5 · 64 + 25 or 3 · 96 + 57, or 8 · 32: fewer, narrower, or both.
        selection=Selection(keep=0.45, uniform=True),
        form="native",
        batch_tokens=512,
    )
    prune(request, Silent())
    answer = ask([out], prompts())[0]
    assert off(answer, reference_logprobs(out, prompts(), {})) <= 2 * BOUND
    assert not isinstance(answer, str)
    assert answer.expert_bytes == sum(open_checkpoint(out).expert_bytes().values())
