"""Tiny random models of each family, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

FAMILIES = ("mixtral", "qwen3_moe")
VOCABULARY = 260
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    # Large weights: with the usual 0.02 a wrong expert would hardly show in the logits.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_model(
    path: Path,
    family: str,
    *,
    experts: int = 8,
    top_k: int = 2,
    width: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random model with a byte tokenizer."""
    torch.manual_seed(seed)
    sizes = _COMMON | {"num_experts_per_tok": top_k} | overrides
    model: Any
    if family == "mixtral":
        config = MixtralConfig(
            num_local_experts=experts, intermediate_size=width, sliding_window=None, **sizes
        )
        model = MixtralForCausalLM(config)
    else:
        moe = {"moe_intermediate_size": width, "intermediate_size": width, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(num_experts=experts, mlp_only_layers=[], **(moe | sizes))
        )
    model.to(dtype).save_pretrained(path)
    _write_tokenizer(path)
    return path


def _write_tokenizer(path: Path) -> None:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_texts(path: Path, seed: int = 0) -> Path:
    """Two domains of random words, a few thousand bytes each."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for domain, letters in (("vowels", "aeiou "), ("consonants", "bcdfg ")):
        for _ in range(12):
            picks = torch.randint(len(letters), (400,), generator=generator).tolist()
            lines.append({"domain": domain, "text": "".join(letters[i] for i in picks)})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
