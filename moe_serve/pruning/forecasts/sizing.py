"""From a GPU's memory to a share of expert bytes."""

from __future__ import annotations

import re
from typing import Final

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import PlanError, UsageError
from moe_serve.families.family import Config
from moe_serve.families.kv import kv_bytes_per_token

USABLE: Final = 0.85
"""Of the memory: vLLM takes 0.9 by default, activations and CUDA graphs some of that."""
DEFAULT_KV_TOKENS: Final = 16_384
_LESS_THAN_ALL: Final = 0.999
"""Where only the layers for multi-token prediction are in the way, next to nothing else goes."""
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``20GiB``, ``24 GB``, ``512MiB`` or a plain number.

    Raises:
        UsageError: it is none of these.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * (_UNITS | _BINARY)[found[2].lower()]) if found else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size", where="--memory", remedy="e.g. 20GiB or 24GB")
    return size


def keep_for_memory(checkpoint: Checkpoint, memory: int, kv_tokens: int, gpus: int = 1) -> float:
    """The largest share of expert bytes with which weights and cache fit.

    Args:
        checkpoint: the original.
        memory: bytes of one GPU.
        kv_tokens: tokens whose keys and values must fit beside the weights.
        gpus: how many share the model (tensor parallelism). Matrices are split over them; routers,
            norms and other vectors are on each.

    Raises:
        UsageError: there is no GPU.
        PlanError: what can't be pruned fills the memory already.
    """
    if gpus < 1:
        raise UsageError(f"is {gpus}", where="--gpu-count", remedy="give 1 or more")
    experts = sum(checkpoint.expert_bytes().values())
    fixed = sum(entry.size for entry in checkpoint.tensors.values()) - experts
    fixed += (gpus - 1) * _on_each(checkpoint)
    cache = gpus * kv_tokens * kv_bytes_per_token(checkpoint.config, gpus)
    usable = int(memory * USABLE) * gpus
    if fixed + experts + cache <= usable:
        return 1.0
    # They draft for the original and go with the first neuron.
    fixed -= sum(checkpoint.prediction_layers().values())
    room = usable - fixed - cache
    if room <= 0:
        least = (fixed + cache) / USABLE / gpus
        raise PlanError(
            f"{gpus} × {memory / 2**30:.2f} GiB are too little: what is never pruned takes "
            f"{fixed / 2**30:.2f} GiB, the cache of {kv_tokens:,} tokens {cache / 2**30:.2f} GiB",
            where="--memory",
            remedy=f"give more than {least / 2**30:.2f} GiB each, or fewer --kv-tokens",
        )
    return min(_LESS_THAN_ALL, room / experts)


def gpus_needed(config: Config, weights: int, memory: int, kv_tokens: int) -> int | None:
    """The least number of GPUs that hold weights and cache; ``None``: 64 do not.

    Powers of two, as tensor parallelism wants them. Vectors and routers, which each GPU holds,
    count once: they are a thousandth of the weights.

    Args:
        config: the checkpoint's.
        weights: bytes of all tensors.
        memory: bytes of one GPU.
        kv_tokens: tokens whose keys and values must fit beside the weights.
    """
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        cache = gpus * kv_tokens * kv_bytes_per_token(config, gpus)
        if weights + cache <= int(memory * USABLE) * gpus:
            return gpus
    return None


def _on_each(checkpoint: Checkpoint) -> int:
    """Bytes that tensor parallelism does not split."""
    routers = {
        checkpoint.family.gate_name(i) for i in checkpoint.family.moe_layers(checkpoint.config)
    }
    return sum(
        entry.size
        for entry in checkpoint.tensors.values()
        if len(entry.shape) < 2 or entry.name in routers
    )
