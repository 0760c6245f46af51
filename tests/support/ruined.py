"""A checkpoint whose experts were replaced by noise of the same size: it loads, and is nonsense."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def ruin(checkpoint: Path, output: Path) -> None:
    """Copy a checkpoint with the down projection of every expert drawn anew."""
    shutil.copytree(checkpoint, output)
    torch.manual_seed(0)
    for file in output.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".experts." in name and name.endswith("down_proj.weight"):
                noise = torch.randn_like(tensor, dtype=torch.float32) * tensor.float().std()
                tensors[name] = noise.to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
