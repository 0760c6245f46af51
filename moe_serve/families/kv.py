"""What a token's keys and values take."""

from __future__ import annotations

from typing import Final

from moe_serve.families.family import Config

_ELEMENT_BYTES: Final = 2
"""vLLM caches in the model's 16-bit format unless told otherwise."""


def kv_bytes_per_token(config: Config, gpus: int = 1) -> int:
    """Bytes of one token's cache over all layers on one of ``gpus`` that share the heads.

    Each holds a head at least, and the whole of what heads have in common.

    Latent attention (DeepSeek-V2 and -V3) caches one latent vector and one rotary key for all
    heads: arXiv 2405.04434, section 2.1.3. An indexer (DeepSeek-V3.2) caches a key of its own.
    """
    layers = int(config["num_hidden_layers"])
    if latent := config.get("kv_lora_rank"):
        index = int(config.get("index_head_dim") or 0)
        return layers * (int(latent) + int(config["qk_rope_head_dim"]) + index) * _ELEMENT_BYTES
    heads = int(config["num_attention_heads"])
    cached = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * layers * -(-cached // gpus) * width * _ELEMENT_BYTES
