"""NAEE's search where subsets are too many to try."""

from __future__ import annotations

import pytest
import torch

from moe_serve.calibration.mixture import Mixture, Router, Unit
from moe_serve.families import Routing
from moe_serve.pruning.methods.naee import _Search

EXPERTS, HIDDEN = 24, 16
RULES = {
    "renormalised": Routing(top_k=3, renormalise=True),
    "probabilities": Routing(top_k=3, renormalise=False),
    "sigmoid, groups": Routing(
        top_k=2,
        score="sigmoid",
        groups=4,
        groups_selected=2,
        group_score="best-two",
        renormalise=True,
    ),
}


def search(rule: Routing) -> tuple[_Search, Mixture, torch.Tensor]:
    """A random layer of 24 experts on two hundred tokens."""
    torch.manual_seed(0)
    units = tuple(
        Unit(
            owners=(e,),
            gate_FD=torch.randn(4, HIDDEN),
            up_FD=torch.randn(4, HIDDEN),
            down_DF=torch.randn(HIDDEN, 4),
        )
        for e in range(EXPERTS)
    )
    bias = torch.rand(EXPERTS) / 4 if rule.score == "sigmoid" else None
    router = Router(weight_ND=torch.randn(EXPERTS, HIDDEN), rule=rule, bias_N=bias)
    mixture = Mixture(router=router, units=units, activation=torch.nn.functional.silu)
    z_SD = torch.randn(200, HIDDEN)
    return _Search.of(mixture, z_SD), mixture, z_SD


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_errors_of_single_steps_are_those_of_the_subsets(rule: Routing) -> None:
    """One expert more gone, or one back: as if the whole layer had been run without them."""
    found, mixture, z_SD = search(rule)
    gone_N = torch.zeros(EXPERTS, dtype=torch.bool)
    gone_N[[1, 6]] = True
    more_N, back_N = found._one_more(gone_N), found._one_back(gone_N, out=6)
    outputs_NSD = torch.stack([mixture.hidden(u, z_SD) @ u.down_DF.T for u in mixture.units])

    def error(dropped: tuple[int, ...]) -> float:
        fewer = Router(
            weight_ND=mixture.router.weight_ND,
            rule=rule,
            bias_N=mixture.router.bias_N,
            dropped=dropped,
        )
        change_SN = fewer(z_SD) - mixture.router(z_SD)
        change_SD = torch.einsum("sn,nsd->sd", change_SN, outputs_NSD)
        return float(change_SD.square().sum(dim=1).mean())

    for expert in range(EXPERTS):
        if expert in (1, 6):
            assert float(more_N[expert]) == float("inf")
        else:
            assert float(more_N[expert]) == pytest.approx(error((1, 6, expert)), rel=1e-4)
    assert float(back_N[1]) == pytest.approx(error((6,)), rel=1e-4)
    assert torch.isinf(back_N).sum() == EXPERTS - 1
    assert found.single() == pytest.approx([error((e,)) for e in range(EXPERTS)], rel=1e-4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_swap_is_left_that_helps(rule: Routing) -> None:
    """Of as few experts as these."""
    found, _, _ = search(rule)
    kept = found.greedy(14)
    best = found.error(kept)
    for out in kept:
        others = [k for k in kept if k != out]
        swaps = [found.error([*others, new]) for new in range(EXPERTS) if new not in kept]
        assert min(swaps) >= best * (1 - 1e-5)
