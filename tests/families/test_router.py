"""The routing rule of each row against the family's own router in transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.calibration.mixture import Router
from moe_serve.errors import CheckpointError
from moe_serve.families import Routing, family_of
from tests.support.models import FAMILIES, settings_of
from tests.support.references import layer_router, mask_router, new_model, router_weights

_WITHOUT_OWN = ("kimi_k2",)
"""DeepSeek-V3's router under another name."""


@cache
def model_of(family: str) -> Any:
    """One small model; its router is rebuilt for every case."""
    return new_model(family, settings_of(family))


def dropped_experts(data: st.DataObject, rule: Routing, experts: int) -> tuple[int, ...]:
    """Any that may be dropped: single ones, all but one of a group, or whole groups."""
    size = experts // rule.groups
    whole = data.draw(st.sets(st.integers(0, rule.groups - 1)), "groups dropped")
    single = data.draw(st.sets(st.integers(0, experts - 1)), "experts dropped")
    kept = [e for e in range(experts) if e // size not in whole and e not in single]
    return () if rule.selection_defects(kept, experts) else tuple(set(range(experts)) - set(kept))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in _WITHOUT_OWN])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_are_transformers(family: str, data: st.DataObject) -> None:
    """Any N, k, groups, scale, bias and renormalisation give the same weights to 1e-6.

    Whatever is dropped: stock software is told by a bias of -1e30, or by a mask where the router
    has no bias, or by both where a softmax makes scores depend on one another. Bias and logits
    spread widely, so that both signs of a biased score occur, and groups whose best expert is not
    selected.
    """
    model = model_of(family)
    layer = len(model.model.layers) - 1
    groups = data.draw(st.sampled_from([1, 2, 4]), "groups")
    experts = groups * data.draw(st.integers(2, 5), "experts per group")
    selected = data.draw(st.integers(1, groups), "groups selected")
    top_k = data.draw(st.integers(1, selected * experts // groups), "top_k")
    row = family_of({"model_type": family})
    scale_key = row.routing.scale_key or "routed_scaling_factor"
    config = model.config.to_dict() | {
        row.top_k_key: top_k,
        "norm_topk_prob": data.draw(st.booleans(), "renormalise"),
        scale_key: data.draw(st.sampled_from([1.0, 2.5]), "scale"),
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "n_group": groups,
        "topk_group": selected,
    }
    config |= dict.fromkeys([key for key in row.count_keys if key in config], experts)
    if row.routing.group_score is None:
        config |= {row.top_k_key: min(top_k, experts)}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    weight_ND = torch.randn(experts, 64, generator=generator) * 0.3
    bias_N = torch.randn(experts, generator=generator) if row.correction_bias else None
    z_TD = torch.randn(7, 64, generator=generator)
    rule = row.routing_of(config)
    gone = dropped_experts(data, rule, experts)
    ours = Router(weight_ND=weight_ND, rule=rule, bias_N=bias_N, dropped=gone)
    told_by_bias = bias_N is not None and rule.score == "sigmoid"
    if bias_N is not None:
        bias_N = bias_N.index_fill(0, torch.tensor(gone).long(), -1e30)
    gate, _ = layer_router(model, layer)
    theirs = type(gate)(type(model.config)(**config))
    with torch.no_grad():
        theirs.weight.copy_(weight_ND)
        for name, values in (*theirs.named_buffers(), *theirs.named_parameters()):
            if bias_N is not None and name.endswith("e_score_correction_bias"):
                values.copy_(bias_N.view_as(values))
        block = model.model.layers[layer].mlp
        if bias_N is not None and hasattr(block, "e_score_correction_bias"):
            block.e_score_correction_bias = bias_N
        block.gate = theirs
        if gone and not told_by_bias:
            mask_router(model, layer, list(gone))
        torch.testing.assert_close(
            ours(z_TD), router_weights(model, layer, z_TD), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3}, "n_group=3 does not divide 8 experts"),
        ({"topk_group": 5}, "topk_group=5 of n_group=4"),
        ({"num_experts_per_tok": 5}, "the 2 groups selected hold 4 experts"),
        ({"n_group": 8}, "fewer than the two"),
        ({"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1}, "of 8 experts"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused(changes: dict[str, int], words: str) -> None:
    """8 experts in 4 groups, 2 of which are selected, 2 experts a token; then one value is off."""
    config = settings_of("deepseek_v3") | {"model_type": "deepseek_v3"} | changes
    with pytest.raises(CheckpointError, match=words):
        family_of(config).routing_of(config)
