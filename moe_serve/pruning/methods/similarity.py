"""How alike two experts are: by their outputs, their weights, their router, their gradients.

Shape suffixes: S tokens, N experts, I neurons per expert, D hidden size, R sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from moe_serve.calibration.mixture import Unit

_PROBES: Final = 1024
"""At most this many input dimensions probe the weights."""


def linear_cka(output_NSD: torch.Tensor) -> torch.Tensor:
    """Linear centred kernel alignment of all pairs of experts' outputs, [N, N] in [0, 1].

    ‖Y_jᵀY_i‖²_F / (‖Y_iᵀY_i‖_F ‖Y_jᵀY_j‖_F) on centred outputs (Kornblith et al. 2019,
    arXiv 1905.00414, eq. 4; arXiv 2407.09590, eq. 3), with the unbiased estimator of HSIC
    (Song et al. 2012, eq. 5; Nguyen et al. 2021, arXiv 2010.15327, eq. 3): the plain one is
    biased upwards unless there are many more tokens than dimensions.

    Args:
        output_NSD: each expert's outputs on the same S tokens, S ≥ 4.
    """
    experts, tokens, _ = output_NSD.shape
    gram_NSS = torch.stack([_centred_gram(y_SD.double()) for y_SD in output_NSD])
    flat = gram_NSS.reshape(experts, tokens * tokens)
    hsic_NN = flat @ flat.T
    own_N = hsic_NN.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
    cka_NN = hsic_NN / torch.sqrt(own_N[:, None] * own_N[None, :])
    return cka_NN.clamp(0.0, 1.0)


def _centred_gram(y_SD: torch.Tensor) -> torch.Tensor:
    """The U-centred Gram matrix: its inner products are unbiased HSIC up to a common factor.

    Source: Székely & Rizzo 2014, definition 2.
    """
    gram = y_SD @ y_SD.T
    gram.fill_diagonal_(0.0)
    n = len(gram)
    row = gram.sum(dim=1) / (n - 2)
    total = gram.sum() / ((n - 1) * (n - 2))
    centred = gram - row[:, None] - row[None, :] + total
    centred.fill_diagonal_(0.0)
    return centred


def surrogate_cka(units: Sequence[Unit]) -> torch.Tensor:
    """Linear CKA of the experts' surrogate matrices W_down (W_gate ⊙ W_up), [N, N] in [0, 1].

    The surrogate (arXiv 2407.09590, section 3, model-centric) replaces a gated expert by one
    D × D matrix. It does not depend on the order of the neurons. Its columns, what each input
    dimension puts out, are compared like outputs on tokens; at most 1024 of them, evenly spaced.
    """
    hidden = units[0].gate_FD.shape[1]
    probes = torch.linspace(0, hidden - 1, min(hidden, _PROBES)).round().long()
    columns = [(u.down_DF @ (u.gate_FD[:, probes] * u.up_FD[:, probes])).T for u in units]
    return linear_cka(torch.stack(columns))


def mean_output_distance(output_NSD: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of the experts' mean outputs over all tokens, [N, N].

    Source: HC-SMoE, arXiv 2410.08589, section 3.
    """
    mean_ND = output_NSD.double().mean(dim=1)
    return _distances(mean_ND)


def logit_cosine(logits_SN: torch.Tensor) -> torch.Tensor:
    """Cosine of the experts' router logits over tokens, not centred, [N, N] in [-1, 1].

    Source: M-SMoE, arXiv 2310.01334, section 3.
    """
    return cosine(logits_SN.double().T, logits_SN.double().T)


def gated_similarity(output_NSD: torch.Tensor, logits_SN: torch.Tensor) -> torch.Tensor:
    """REAM's similarity of gated outputs and of router logits, [N, N] in [0, 1].

    The mean of (1 + cos)/2 over the experts' mean outputs, each weighted by its softmax over all
    experts, and 1 - d/max d, d the distances of the logit columns scaled to norm one.

    Source: REAM, arXiv 2604.04356, section 3, in the form its published code has: outputs are
    averaged over tokens before they are compared.
    """
    logits_SN = logits_SN.double()
    gate_SN = torch.softmax(logits_SN, dim=1)
    mean_ND = torch.einsum("sn,nsd->nd", gate_SN, output_NSD.double()) / len(gate_SN)
    distance_NN = _distances(torch.nn.functional.normalize(logits_SN.T, dim=1))
    widest = distance_NN.max().clamp(min=torch.finfo(torch.float64).tiny)
    return ((cosine(mean_ND, mean_ND) + 1) / 2 + 1 - distance_NN / widest) / 2


def gradient_cosine(map_NRR: torch.Tensor) -> torch.Tensor:
    """Cosine of the loss's gradients with respect to the experts' maps, [N, N] in [-1, 1].

    Args:
        map_NRR: :attr:`LayerGradients.map_NRR`.
    """
    flat = map_NRR.double().flatten(1)
    return cosine(flat, flat)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of all pairs of rows."""
    normalize = torch.nn.functional.normalize
    return normalize(a, dim=1) @ normalize(b, dim=1).T


def _distances(rows: torch.Tensor) -> torch.Tensor:
    # The matrix-product shortcut loses what tells near-equal experts apart.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
