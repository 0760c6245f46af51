"""Log-probabilities of what stock vLLM can't serve: a tied checkpoint with ``router_mask``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from moe_serve.calibration.decoder import Decoder, Layer
from moe_serve.checkpoint.form import ROUTER_MASK
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.files import reading


@torch.inference_mode()
def forced_logprobs(tied: Path, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token but the first, given those before it, in FP32.

    Attention and norms are transformers', layer by layer; the mask is added to the router's logits
    before it scores. Memory: one layer, the output matrix, and the hidden states.

    Raises:
        CheckpointError: the mask is not for this model, or weights are damaged.
    """
    checkpoint = open_checkpoint(tied)
    decoder = Decoder(checkpoint, torch.device("cpu"))
    with reading(tied / ROUTER_MASK):
        masks = {int(layer): mask for layer, mask in load_file(tied / ROUTER_MASK).items()}
    if odd := masks.keys() - set(checkpoint.family.moe_layers(checkpoint.config)):
        raise CheckpointError(
            f"masks layers without experts: {sorted(odd)}",
            where=str(tied / ROUTER_MASK),
            remedy="export the compact checkpoint again",
        )
    embedding = decoder.embedding()
    states = [embedding[torch.tensor([text])] for text in texts]
    for index in range(decoder.layers):
        layer = _masked(decoder.layer(index), masks.get(index))
        for number, x_BLD in enumerate(states):
            r_BLD = layer.attend(x_BLD, decoder.rotary(*x_BLD.shape[:2]))
            states[number] = r_BLD + layer.feed_forward(layer.normed(r_BLD))
    head = decoder.head()
    rows = []
    for text, x_BLD in zip(texts, states, strict=True):
        logs_LV = head(x_BLD[0, :-1]).log_softmax(dim=-1)
        rows.append(logs_LV.gather(1, torch.tensor(text[1:])[:, None]).flatten().tolist())
    return rows


def _masked(layer: Layer, mask_N: torch.Tensor | None) -> Layer:
    if mask_N is None or layer.mixture is None:
        return layer
    dropped = tuple(mask_N.isneginf().nonzero().flatten().tolist())
    router = replace(layer.mixture.router, dropped=dropped)
    return replace(layer, mixture=replace(layer.mixture, router=router))
