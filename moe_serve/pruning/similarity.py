"""How alike two experts are."""

from __future__ import annotations

import torch


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
