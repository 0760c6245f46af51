"""What a Mixture-of-Experts architecture is, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_serve.errors import CheckpointError, UnsupportedFamily
from moe_serve.families.routing import Routing, RoutingRule

Config = Mapping[str, Any]


class Projections(NamedTuple):
    """Tensor name endings of a gated expert: down(act(gate x) * (up x))."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes pruning needs, read from one config."""

    layers: int
    hidden: int
    experts: int
    """Routed experts per layer, N."""
    top_k: int
    width: int
    """Neurons of one routed expert, I."""
    vocabulary: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table. Names may hold ``{layer}`` and ``{expert}``."""

    model_type: str
    architecture: str
    """The class name in ``config.json``'s ``architectures``."""
    count_keys: tuple[str, ...]
    """Config keys that give N; the first one present counts, all present are rewritten."""
    top_k_key: str
    width_key: str
    block: str
    """Prefix of a layer's mixture-of-experts tensors."""
    gate: str
    """Router weight [N, D]."""
    expert: str
    """Prefix of one expert's tensors."""
    projections: Projections
    routing: RoutingRule
    width_copies: tuple[str, ...] = ()
    """Config keys that repeat I for other software; those present are rewritten with it."""
    correction_bias: str | None = None
    """Router bias, [N] or [1, N], that counts for selection only."""
    bias_is_row: bool = False
    """It is stored as [1, N]."""
    shared: str | None = None
    """Prefix of the expert that every token takes."""
    shared_count_key: str | None = None
    """Config key n where the shared expert is n times as wide as a routed one."""
    shared_gate: str | None = None
    """Weight [1, D] whose sigmoid scales the shared expert."""
    sparse_step_key: str | None = None
    """Config key: every n-th layer is a mixture (absent: every layer)."""
    dense_layers_key: str | None = None
    """Config key: list of layer indices that are dense although the step says otherwise."""
    first_sparse_key: str | None = None
    """Config key: index of the first layer that is a mixture."""
    last_sparse_key: str | None = None
    """Config key: index of the last one (absent or -1: the last layer)."""
    frequency_key: str | None = None
    """Config key: from there on, layers whose index it divides are mixtures."""
    kinds_key: str | None = None
    """Config key: ``"dense"`` or ``"sparse"`` for each layer; where present, it decides."""
    extra_layers_key: str | None = None
    """Config key: number of layers beyond the decoder's, for multi-token prediction."""
    extra_prefix: str | None = None
    """What their tensors' names begin with, where they are not numbered on from the decoder's."""
    skeleton: str | None = None
    """``model_type`` of the transformers class whose modules outside the experts are the same,
    where there is none of this family's own: published with code that is never executed."""
    indexer: str | None = None
    """What, within a layer, the names of an indexer's tensors begin with: it chooses the tokens
    that attention sees. They go over as they are and are not read."""
    indexed_key: str | None = None
    """Config key: how many it chooses. On sequences no longer attention sees every token."""
    ties_in_vllm: bool = True
    """vLLM's class heeds ``tie_word_embeddings``; others then serve an output never written."""
    latent_attention: bool = False
    """Queries are rotated in part: what vLLM's rotary kernel for CPUs gets wrong."""
    cpu_obstacle: str | None = None
    """Why vLLM 0.32 serves it wrongly on a processor, or not at all."""
    vllm_keys: tuple[tuple[str, str], ...] = ()
    """What vLLM reads from ``config.json`` where transformers takes it for granted; without it the
    layers are others."""
    served: bool = False
    """The vLLM plugin has a row for the compact form; others go as ``tied`` or ``native``."""

    @property
    def compact_architecture(self) -> str:
        """The name under which a compact checkpoint is served; stock software refuses it."""
        return f"Compact{self.architecture}"

    def shape(self, config: Config) -> Shape:
        """Read the sizes.

        Raises:
            UnsupportedFamily: a key is missing or holds no positive integer.
        """
        count_key = next((key for key in self.count_keys if key in config), self.count_keys[0])
        return Shape(
            layers=self._count(config, "num_hidden_layers"),
            hidden=self._count(config, "hidden_size"),
            experts=self._count(config, count_key),
            top_k=self._count(config, self.top_k_key),
            width=self._count(config, self.width_key),
            vocabulary=self._count(config, "vocab_size"),
        )

    def longest(self, config: Config) -> int | None:
        """Tokens of the longest sequence on which attention is plainly causal, where it is said."""
        keys = ("max_position_embeddings", "sliding_window", self.indexed_key)
        limits = [config.get(key) for key in keys if key]
        return min((n for n in limits if isinstance(n, int) and n > 0), default=None)

    def _count(self, config: Config, key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedFamily(
                f"{key!r} is {value!r}, not a positive integer",
                where="config.json",
                remedy=f"a {self.model_type} checkpoint needs it; restore the original config.json",
            )
        return value

    def routing_of(self, config: Config) -> Routing:
        """The routing rule of one checkpoint.

        Raises:
            CheckpointError: the config's values contradict one another.
        """
        shape = self.shape(config)
        rule = self.routing.fill(config, shape.top_k)
        if found := rule.defects(shape.experts):
            raise CheckpointError(
                "; ".join(found), where="config.json", remedy="restore the original config.json"
            )
        return rule

    def moe_layers(self, config: Config) -> tuple[int, ...]:
        """Indices of the layers that hold routed experts, in order."""

        def number(key: str | None, otherwise: int) -> int:
            return int(config.get(key) or otherwise) if key else otherwise

        layers = self.shape(config).layers
        if self.kinds_key and (kinds := config.get(self.kinds_key)):
            return tuple(i for i, kind in enumerate(kinds[:layers]) if kind == "sparse")
        step, frequency = number(self.sparse_step_key, 1), number(self.frequency_key, 1)
        first = number(self.first_sparse_key, 0)
        last = config.get(self.last_sparse_key) if self.last_sparse_key else None
        end = layers if last is None or int(last) < 0 else min(int(last) + 1, layers)
        dense = set(config.get(self.dense_layers_key) or ()) if self.dense_layers_key else set()
        return tuple(
            i
            for i in range(first, end)
            if i not in dense and (i + 1) % step == 0 and i % frequency == 0
        )

    def shared_names(self, layer: int) -> Projections | None:
        """Names of the shared expert's gate, up and down weights."""
        if self.shared is None:
            return None
        prefix = self.shared.format(layer=layer)
        return Projections(*(f"{prefix}.{ending}" for ending in self.projections))

    def gate_name(self, layer: int) -> str:
        """Name of the router weight."""
        return self.gate.format(layer=layer)

    def expert_names(self, layer: int, expert: int) -> Projections:
        """Names of one expert's gate, up and down weights."""
        prefix = self.expert.format(layer=layer, expert=expert)
        return Projections(*(f"{prefix}.{ending}" for ending in self.projections))

    def expert_prefix(self, layer: int) -> str:
        """What the names of all experts' tensors of a layer begin with."""
        return self.expert.split("{expert}")[0].format(layer=layer)

    def shared_count(self, config: Config, width: int) -> int | None:
        """``width``'s multiple that holds the shared expert; ``None`` where its size is free."""
        if self.shared_count_key is None:
            return None
        whole = int(config.get(self.shared_count_key) or 0) * self._count(config, self.width_key)
        return -(-whole // width)

    def bias_name(self, layer: int) -> str | None:
        """Name of the router's correction bias, where the family has one."""
        return self.correction_bias.format(layer=layer) if self.correction_bias else None

    def bias_shape(self, experts: int) -> tuple[int, ...]:
        """Shape of the correction bias of so many experts, as stored."""
        return (1, experts) if self.bias_is_row else (experts,)

    def extra_prefixes(self, config: Config) -> tuple[str, ...]:
        """What tensors of layers beyond the decoder begin with (multi-token prediction)."""
        count = int(config.get(self.extra_layers_key) or 0) if self.extra_layers_key else 0
        if self.extra_prefix is not None:
            return (self.extra_prefix,) if count else ()
        first = self.shape(config).layers
        return tuple(self.layer_prefix(i) for i in range(first, first + count))

    @staticmethod
    def layer_prefix(layer: int) -> str:
        """What the names of all tensors of a decoder layer begin with."""
        return f"model.layers.{layer}."
