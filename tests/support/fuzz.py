"""Damaged compact checkpoints, and what the plugin says about them before it reads a weight."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe_serve_vllm.errors import CompactError
from moe_serve_vllm.files import check_files, check_hashes
from moe_serve_vllm.table import tables_of

NAME, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "moe_serve.json"
_WIDTH, _HIDDEN, _LAYERS, _EXPERTS = 32, 4, 2, 4
_JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 31, 64, 1.5, 10**9, 2**63, 10**30, float("nan"), float("inf")),
    *("", "0", "F32", "I32", "F8_E4M3", "model.safetensors", "../model.safetensors", "x" * 400),
    *("\0", "CompactMixtralForCausalLM", [], {}, [[]], [None], [0], {"0": []}, [0, 10**12]),
)


def sound() -> tuple[dict[str, Any], bytes]:
    """Config and weights of a small compact checkpoint without defects."""
    config = {
        "architectures": ["CompactQwen3MoeForCausalLM"],
        "num_hidden_layers": _LAYERS,
        "hidden_size": _HIDDEN,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2 * _WIDTH,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "compact_experts": {
            "version": 1,
            "layers": {"1": {"width": _WIDTH, "blocks": 3, "experts": [[0, 1], [2], [], None]}},
        },
    }
    weights = {"model.norm.weight": torch.ones(_HIDDEN)}
    for layer, count, width in ((0, _EXPERTS, 2 * _WIDTH), (1, 3, _WIDTH)):
        for number in range(count):
            prefix = f"model.layers.{layer}.mlp.experts.{number}."
            weights[f"{prefix}gate_proj.weight"] = torch.ones(width, _HIDDEN)
            weights[f"{prefix}up_proj.weight"] = torch.ones(width, _HIDDEN)
            weights[f"{prefix}down_proj.weight"] = torch.ones(_HIDDEN, width)
    return config, save(weights)


def changed(value: Any, rng: random.Random) -> Any:
    """The JSON value with one part of it, somewhere, replaced, removed or doubled."""
    value = copy.deepcopy(value)
    inside = isinstance(value, dict | list) and value and rng.random() < 0.85
    if not inside:
        return copy.deepcopy(rng.choice(_JUNK))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[str(rng.choice(_JUNK))] = copy.deepcopy(value[key])
        case 1:
            value.append(copy.deepcopy(value[key]))
        case _:
            value[key] = changed(value[key], rng)
    return value


def _bytes(weights: bytes, rng: random.Random) -> bytes:
    """Weights with their header or their length damaged."""
    length = struct.unpack("<Q", weights[:8])[0]
    header, data = weights[8 : 8 + length], weights[8 + length :]
    match rng.randrange(8):
        case 0:
            return weights[: rng.randrange(len(weights))]
        case 1:
            return weights + bytes(rng.randrange(1, 40))
        case 2:
            lie = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
            return struct.pack("<Q", lie) + weights[8:]
        case 3:
            place = rng.randrange(8, 8 + length)
            return weights[:place] + bytes([rng.randrange(256)]) + weights[place + 1 :]
        case 4:
            text = rng.choice((b"[" * 5000, b"{}", b"[]", b"[1]", b"null", b'{"a":[1]}', b"\xff{"))
            return struct.pack("<Q", len(text)) + text + data
        case 5:
            # Two tensors at the same place.
            entries = json.loads(header)
            first, second = rng.sample(sorted(entries), 2)
            entries[first]["data_offsets"] = entries[second]["data_offsets"]
            text = json.dumps(entries).encode()
        case _:
            text = json.dumps(changed(json.loads(header), rng)).encode()
    return struct.pack("<Q", len(text)) + text + data


def run_case(seed: int, folder: Path) -> str:
    """Damage one thing and read the result: ``accepted`` or ``refused``.

    Any exception that is not the plugin's own passes through, and so does an assertion that what
    was accepted can be opened by safetensors.
    """
    rng = random.Random(seed)
    config, weights = sound()
    index: Any = {"weight_map": dict.fromkeys(_names(weights), NAME)}
    manifest: Any = {"files": {NAME: hashlib.sha256(weights).hexdigest()}}
    check: Callable[[], object] = lambda: None
    match rng.randrange(5):
        case 0:
            config["compact_experts"] = changed(config["compact_experts"], rng)
        case 1:
            config = changed(config, rng)
            config = config if isinstance(config, dict) else {}
        case 2:
            weights = _bytes(weights, rng)
        case 3:
            index = changed(index, rng)
        case _:
            manifest = changed(manifest, rng)
            check = lambda: check_hashes(folder)
    (folder / NAME).write_bytes(weights)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        family, tables = tables_of(config)
        check_files(folder, family, tables, config)
        check()
    except CompactError:
        return "refused"
    try:
        with safe_open(folder / NAME, framework="pt") as file:
            assert set(file.keys()) >= set(_names(sound()[1])) - {"model.norm.weight"}
    except SafetensorError as exc:
        raise AssertionError(f"accepted, but safetensors refuses it: {exc}") from exc
    return "accepted"


def _names(weights: bytes) -> list[str]:
    length = struct.unpack("<Q", weights[:8])[0]
    return [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
