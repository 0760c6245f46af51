"""A model's decoder, one layer in memory at a time.

Attention, norms and embeddings are transformers' own modules (the forward pass of record); only
the routed experts are ours, so that original and compact layers run through the same code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from moe_serve.calibration.mixture import Mixture, read_mixture
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.files import MISMATCH

_DERIVED: Final = ".rotary_emb.inv_freq"
"""Old checkpoints store it; it follows from the config."""
_IDENTITY: Final = frozenset({"model_type", "architectures", "auto_map"})
"""Config keys that say which class to load, as opposed to how large it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer. B sequences, L tokens each, D hidden size."""

    index: int
    module: Any
    mixture: Mixture | None
    """``None`` where the layer's feed-forward is dense."""

    def attend(
        self, x_BLD: torch.Tensor, rotary: Any, mask_B1LL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The residual stream after attention, r = x + attention(norm(x)); causal without a mask.

        True in a mask: is seen.
        """
        attended, *_ = self.module.self_attn(
            hidden_states=self.module.input_layernorm(x_BLD),
            attention_mask=mask_B1LL,
            position_embeddings=rotary,
        )
        r_BLD: torch.Tensor = x_BLD + attended
        return r_BLD

    def normed(self, r_BLD: torch.Tensor) -> torch.Tensor:
        """What the feed-forward reads, z."""
        z: torch.Tensor = self.module.post_attention_layernorm(r_BLD)
        return z

    def feed_forward(self, z_BLD: torch.Tensor) -> torch.Tensor:
        """The feed-forward's output y; the next layer's input is r + y."""
        if self.mixture is None:
            y: torch.Tensor = self.module.mlp(z_BLD)
            return y
        return self.mixture(z_BLD.flatten(0, 1)).view_as(z_BLD)


class Decoder:
    """Embeds, walks layer by layer, and computes logits.

    Peak memory: one layer in FP32 and the next one as it is stored, or the embedding or the output
    matrix; one batch.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Build the skeleton without weights."""
        from transformers import AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.device = device
        config = _skeleton_config(checkpoint)
        # SDPA with no mask is causal; other implementations would want one spelled out.
        config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers has no public setter
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            ).eval()
        self._inner = self._model.model
        self._rotary = type(self._inner.rotary_emb)(config=config).to(device)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.checkpoint.shape.layers

    def embedding(self) -> torch.Tensor:
        """The input embedding [V, D], FP32."""
        return self._read("model.embed_tokens.weight")

    def rotary(self, batch: int, length: int, places_BL: torch.Tensor | None = None) -> Any:
        """Position embeddings for ``batch`` sequences of ``length`` tokens, one after another.

        Unless ``places_BL`` says where each token stands.
        """
        if places_BL is None:
            places_BL = torch.arange(length, device=self.device)[None]
        like = torch.empty(batch, length, 1, device=self.device)
        return self._rotary(like, position_ids=places_BL)

    def layer(self, index: int, *, ahead: int | None = None) -> Layer:
        """Load one layer's weights; drop the returned object to free them.

        Args:
            index: the layer.
            ahead: the one wanted next; its bytes are read while this one computes.
        """
        family = self.checkpoint.family
        sparse = index in family.moe_layers(self.checkpoint.config)
        skeleton = self._inner.layers[index]
        prefix = family.layer_prefix(index)
        block = family.block.format(layer=index) + "."
        idle = prefix + family.indexer if family.indexer else None
        weights = {
            name.removeprefix(prefix): self._read(name)
            for name in self.checkpoint.layer_matrices(index)
            if not (sparse and name.startswith(block))
            and not name.endswith(_DERIVED)
            and not (idle and name.startswith(idle))
        }
        module = _LayerParts(skeleton, dense=not sparse)
        module.load(weights, where=str(self.checkpoint.path))
        mixture = read_mixture(self.checkpoint, index, self.device) if sparse else None
        if ahead is not None:
            self.checkpoint.read_ahead(ahead)
        return Layer(index=index, module=module, mixture=mixture)

    def head(self) -> OutputHead:
        """Load final norm and output matrix.

        Raises:
            CheckpointError: there is no matrix, or it contradicts the config.
        """
        weight = self._read(self._output_name())
        norm = copy.deepcopy(self._inner.norm)
        norm.load_state_dict({"weight": self._read("model.norm.weight")}, assign=True)
        return OutputHead(norm=norm, weight_VD=weight)

    def _output_name(self) -> str:
        """The output matrix, or the embedding where the config ties it to that."""
        checkpoint, embedding, own = self.checkpoint, "model.embed_tokens.weight", "lm_head.weight"
        tied = bool(checkpoint.config.get("tie_word_embeddings", False))
        if not checkpoint.has(own):
            if tied:
                return embedding
            raise CheckpointError(
                f"holds no {own} and the config does not tie it to the embedding",
                where=str(checkpoint.path),
                remedy="fetch the missing shard",
            )
        if tied and not torch.equal(checkpoint.weight(own), checkpoint.weight(embedding)):
            raise CheckpointError(
                f"tie_word_embeddings is true, but {own} differs from {embedding}",
                where=str(checkpoint.path),
                remedy="set it to false if the matrix is the model's own: software disagrees on "
                "which of the two to take",
            )
        return own

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.weight(name).to(self.device)


def _skeleton_config(checkpoint: Checkpoint) -> Any:
    """The config of the transformers class whose modules outside the experts are the model's.

    Made from the family's row and the config's values alone: ``auto_map`` is not looked at.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    family = checkpoint.family
    settings = {k: v for k, v in checkpoint.config.items() if k not in _IDENTITY}
    try:
        return CONFIG_MAPPING[family.skeleton or family.model_type].from_dict(settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as exc:
        raise CheckpointError(
            "does not describe a model of its family: " + " ".join(str(exc).split()),
            where=str(checkpoint.path / "config.json"),
            remedy="restore the original config.json",
        ) from exc


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputHead:
    """Final norm and output matrix."""

    norm: nn.Module
    weight_VD: torch.Tensor

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V]."""
        normed: torch.Tensor = self.norm(x_TD)
        return normed @ self.weight_VD.T

    def divergence(self, theirs_TD: torch.Tensor, ours_TD: torch.Tensor) -> torch.Tensor:
        """KL(theirs ‖ ours) of the next token [T], in nats; differentiable in ours."""
        with torch.no_grad():
            theirs_TV = torch.log_softmax(self(theirs_TD), dim=-1)
        ours_TV = torch.log_softmax(self(ours_TD), dim=-1)
        return (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(dim=-1)


class _LayerParts(nn.Module):
    """The sub-modules of a transformers decoder layer, without its experts."""

    def __init__(self, skeleton: nn.Module, *, dense: bool) -> None:
        super().__init__()
        # Copies (of meta tensors, so free of cost): the weights go when the layer is dropped.
        self.self_attn = copy.deepcopy(skeleton.self_attn)
        self.input_layernorm = copy.deepcopy(skeleton.input_layernorm)
        self.post_attention_layernorm = copy.deepcopy(skeleton.post_attention_layernorm)
        if dense:
            self.mlp = copy.deepcopy(skeleton.mlp)

    def load(self, weights: dict[str, torch.Tensor], *, where: str) -> None:
        """Bind weights by name.

        Raises:
            CheckpointError: a tensor is missing, superfluous or of another shape.
        """
        try:
            self.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as exc:
            raise CheckpointError(
                "the layer's tensors do not fit the architecture: " + " ".join(str(exc).split()),
                where=where,
                remedy=MISMATCH,
            ) from exc
