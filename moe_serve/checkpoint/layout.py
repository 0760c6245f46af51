"""What a pruned checkpoint's files hold: which tensors, in which order, under which config."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.checkpoint.header import TensorEntry
from moe_serve.checkpoint.shards import Run, TensorSpec
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.substitution import KEY, constant_name, retained, to_config
from moe_serve.checkpoint.table import CompactTable
from moe_serve.checkpoint.vocabulary import name_class
from moe_serve.families import Family, Projections
from moe_serve.files import write_json, writing

_NOT_CARRIED: Final = frozenset(
    {"config.json", "README.md", "moe_serve.json", "plan.json", "evidence.json", ".gitattributes"}
)
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")
_MAX_CARRIED: Final = 64 * 1024**2
"""Files beside the weights are small; a larger one is not a tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """How many experts (or blocks) of which width one layer stores, and its router's rows."""

    count: int
    width: int
    rows: int
    shared: int | None = None
    """Neurons of the shared expert where it has to grow."""
    replaced: tuple[int, ...] = ()
    """Experts stored as a constant; the others keep the original's ids."""

    def names(self, family: Family, layer: int) -> list[Projections]:
        """The matrices of each stored expert."""
        ids = retained(self.replaced, self.rows) if self.replaced else range(self.count)
        return [family.expert_names(layer, expert) for expert in ids]


def needs_head(checkpoint: Checkpoint) -> bool:
    """Whether a stock form must hold an output: the original ties it, vLLM's class does not.

    The compact form needs none: the plugin's loader takes the embedding.
    """
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    return tied and not checkpoint.family.ties_in_vllm and HEAD not in checkpoint.tensors


def runs(checkpoint: Checkpoint, layers: dict[int, Stored], *, head: bool = False) -> list[Run]:
    """The tensors of the output in stored order: the original's, changed layers re-shaped.

    Layers for multi-token prediction go where others change: they draft for the original model.

    Args:
        checkpoint: the original.
        layers: what changed layers store; the others are as in the original.
        head: store the embedding a second time, as the output.
    """
    family, shape = checkpoint.family, checkpoint.shape
    present = {
        layer: Stored(
            count=table.blocks if (table := checkpoint.table.layers.get(layer)) else shape.experts,
            width=table.width if table else shape.width,
            rows=shape.experts,
        )
        for layer in family.moe_layers(checkpoint.config)
    }
    prefixes = {family.expert_prefix(layer): layer for layer in present}
    routers = {family.gate_name(layer): layer for layer in present}
    biases = {bias: layer for layer in present if (bias := family.bias_name(layer))}
    shared = _shared_shapes(checkpoint, layers)
    extra = _extra(checkpoint, changed=bool(layers))
    ordered = sorted(checkpoint.tensors.values(), key=lambda e: (e.file, e.start))
    result: list[Run] = []
    written: set[int] = set()
    for entry in ordered:
        if extra and entry.name.startswith(extra):
            continue
        expert_of = next((i for p, i in prefixes.items() if entry.name.startswith(p)), None)
        if expert_of is not None:
            if expert_of not in written:
                written.add(expert_of)
                stored = layers.get(expert_of, present[expert_of])
                result += _expert_runs(checkpoint, expert_of, stored)
            continue
        form = shared.get(entry.name, entry.shape)
        if entry.name in routers and routers[entry.name] in layers:
            form = (layers[routers[entry.name]].rows, *form[1:])
        if entry.name in biases and biases[entry.name] in layers:
            form = family.bias_shape(layers[biases[entry.name]].rows)
        result.append((TensorSpec(name=entry.name, dtype=entry.dtype, shape=form),))
        if head and entry.name == EMBEDDING:
            result.append((TensorSpec(name=HEAD, dtype=entry.dtype, shape=form),))
    return result


def _shared_shapes(checkpoint: Checkpoint, layers: dict[int, Stored]) -> dict[str, tuple[int, ...]]:
    """New shapes of the shared experts' tensors, where they grow."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, stored in layers.items():
        names = checkpoint.family.shared_names(layer)
        if names is not None and stored.shared is not None:
            for name, form in zip(names, _forms(checkpoint, stored.shared), strict=True):
                scheme = checkpoint.scheme(name)
                tensors, forms = scheme.tensors(name), scheme.shapes(*form)
                shapes |= {tensors[ending]: forms[ending] for ending in tensors}
    return shapes


def _forms(checkpoint: Checkpoint, width: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the gate, up and down matrices of an expert of ``width`` neurons."""
    hidden = checkpoint.shape.hidden
    return (width, hidden), (width, hidden), (hidden, width)


def _expert_runs(checkpoint: Checkpoint, layer: int, stored: Stored) -> list[Run]:
    """Each expert's matrices stay together, and so do the tensors of each matrix."""
    schemes = checkpoint.expert_scheme(layer)
    forms = _forms(checkpoint, stored.width)
    constants: list[Run] = [
        (
            TensorSpec(
                name=constant_name(checkpoint.family, layer, expert),
                dtype=constant_dtype(checkpoint, layer),
                shape=(checkpoint.shape.hidden,),
            ),
        )
        for expert in stored.replaced
    ]
    return constants + [
        tuple(
            TensorSpec(
                name=scheme.tensors(name)[piece.ending],
                dtype=piece.dtype,
                shape=piece.shape(*form),
            )
            for name, scheme, form in zip(names, schemes, forms, strict=True)
            for piece in scheme.pieces
        )
        for names in stored.names(checkpoint.family, layer)
    ]


def constant_dtype(checkpoint: Checkpoint, layer: int) -> str:
    """Constants are stored as the down projections of plain numbers are."""
    return checkpoint.expert_scheme(layer)[2].pieces[0].dtype


def compact_config(checkpoint: Checkpoint, table: CompactTable) -> dict[str, Any]:
    """The original config under the compact architecture's name, with the table."""
    config = _own_config(checkpoint)
    config["architectures"] = [checkpoint.family.compact_architecture]
    config["compact_experts"] = table.to_config()
    return _without_extra(checkpoint, config, changed=bool(table.layers))


def substitution_config(
    checkpoint: Checkpoint, replaced: dict[int, tuple[int, ...]]
) -> dict[str, Any]:
    """The original config with the list of experts that are constants."""
    config = stock_config(checkpoint, changed=bool(replaced))
    return config | {KEY: to_config(replaced)}


def stock_config(
    checkpoint: Checkpoint,
    *,
    changed: bool,
    experts: int | None = None,
    width: int | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """A config stock software loads: no table, the original architecture, other sizes if given."""
    family = checkpoint.family
    config = _own_config(checkpoint)
    config.pop("compact_experts", None)
    config["architectures"] = [family.architecture]
    if needs_head(checkpoint):
        config["tie_word_embeddings"] = False
    if experts is not None:
        for key in family.count_keys:
            if key in config:
                config[key] = experts
    if width is not None:
        if family.shared_count_key and (count := family.shared_count(config, width)):
            config[family.shared_count_key] = count
        config[family.width_key] = width
        config |= {key: width for key in family.width_copies if key in config}
    if top_k is not None:
        config[family.top_k_key] = top_k
    return _without_extra(checkpoint, config, changed=changed)


def _own_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A copy of the config that names no script: those are left behind."""
    config = copy.deepcopy(checkpoint.config)
    config.pop("auto_map", None)
    return config


def _extra(checkpoint: Checkpoint, *, changed: bool) -> tuple[str, ...]:
    return checkpoint.family.extra_prefixes(checkpoint.config) if changed else ()


def _without_extra(
    checkpoint: Checkpoint, config: dict[str, Any], *, changed: bool
) -> dict[str, Any]:
    key = checkpoint.family.extra_layers_key
    if changed and key and key in config:
        config[key] = 0
    return config


def carry_over(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and licence files; name what was copied.

    Weights, scripts and what this program writes itself are left behind: code from a checkpoint
    is neither executed nor passed on. The target's config is written already: by it transformers
    chooses a tokenizer's class, which may have to be another.
    """
    copied = []
    for file in sorted(checkpoint.path.iterdir()):
        skip = (
            not file.is_file()
            or file.name in _NOT_CARRIED
            or file.name.startswith(".")
            or file.suffix in (*_WEIGHT_SUFFIXES, ".py")
            or file.name.endswith(".index.json")
            or file.stat().st_size > _MAX_CARRIED
        )
        if not skip:
            with writing(target / file.name):
                shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    name_class(target)
    return copied


def write_config(target: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``."""
    write_json(target / "config.json", config)


def copied_entries(checkpoint: Checkpoint, changed: set[int]) -> list[TensorEntry]:
    """Tensors that go over: all but the experts of changed layers."""
    prefixes = tuple(checkpoint.family.expert_prefix(layer) for layer in changed)
    prefixes += _extra(checkpoint, changed=bool(changed))
    entries = sorted(checkpoint.tensors.values(), key=lambda e: (e.file, e.start))
    return [e for e in entries if not (prefixes and e.name.startswith(prefixes))]
