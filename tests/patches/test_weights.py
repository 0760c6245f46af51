"""Every element of a model comes from the files, or nothing is served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moe_serve_vllm.errors import WeightsError
from moe_serve_vllm.weights import every_element_written, missing_head, with_head

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Model(nn.Module):
    """Two projections in one parameter, as vLLM fuses them, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.lm_head = nn.Linear(3, 5, bias=False)


def loaded(write: Callable[[Model], set[str]]) -> Model:
    """A model after loading."""
    model = Model()
    with every_element_written(model, "here") as names, torch.no_grad():
        names.update(write(model))
    return model


def everything(model: Model) -> set[str]:
    """Load it whole."""
    model.gate_up.fill_(1.0)
    model.lm_head.weight.fill_(2.0)
    return {"gate_up", HEAD}


def test_a_model_that_was_written_whole_is_served() -> None:
    """And holds what was written."""
    model = loaded(everything)
    assert model.gate_up.tolist() == [[1.0] * 3] * 4


def test_half_a_fused_parameter_is_named() -> None:
    """Its name was among the loaded ones, which is all that vLLM looks at."""

    def half(model: Model) -> set[str]:
        names = everything(model)
        model.gate_up[2:] = torch.nan  # what it held before loading
        return names

    with pytest.raises(WeightsError, match="here: gate_up is NaN in places"):
        loaded(half)


def test_what_was_in_memory_before_does_not_count() -> None:
    """A parameter whose loader wrote two rows of four, though all four held numbers before."""

    def first_rows(model: Model) -> set[str]:
        model.gate_up[:2] = 1.0
        model.lm_head.weight.fill_(2.0)
        return {"gate_up", HEAD}

    with pytest.raises(WeightsError, match="gate_up is NaN in places"):
        loaded(first_rows)


def test_a_parameter_without_a_tensor_is_named() -> None:
    """As the output that vLLM leaves unwritten where a config ties it."""

    def without_head(model: Model) -> set[str]:
        model.gate_up.fill_(1.0)
        return {"gate_up"}

    with pytest.raises(WeightsError, match=r"no tensor for lm_head\.weight"):
        loaded(without_head)


def test_a_tied_output_is_the_embedding() -> None:
    """Given once more where the model has an output of its own and the files have none."""
    assert missing_head(Model(), {"tie_word_embeddings": True})
    assert not missing_head(Model(), {"tie_word_embeddings": False})
    assert not missing_head(nn.Linear(1, 1), {"tie_word_embeddings": True})
    embedding, own = torch.ones(5, 3), torch.zeros(5, 3)
    given = dict(with_head([(EMBEDDING, embedding), ("model.norm.weight", own)]))
    assert given[HEAD] is embedding
    assert dict(with_head([(HEAD, own), (EMBEDDING, embedding)]))[HEAD] is own
