"""Keep the memory of a converted model, which is all that was trained, in a file of a sixtieth of the model's size, and bring it back.

    python recipes/smollm2/memory.py pack runs/smollm2/taught recipes/smollm2/memory.safetensors
    python recipes/smollm2/memory.py unpack runs/smollm2/converted recipes/smollm2/memory.safetensors runs/smollm2/base

Matrices are kept in int8 with a scale for each row, the rest in bfloat16. What is unpacked is a little off what was packed, so a study's
base is the unpacked model: everybody begins from the same bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refine_nsp.files import made_whole
from refine_nsp.models.lact import LaCTMixer

WEIGHTS, SCALE = "model.safetensors", ".scale"


def is_memory(name: str) -> bool:
    """Tell whether a parameter is the memory's alone."""
    return name.partition(".attn.")[2].split(".")[0] in LaCTMixer.memory_names


def pack(model: Path, file: Path) -> None:
    """Write the memory of a model's folder into a file."""
    kept: dict[str, Tensor] = {}
    for name, weight in load_file(model / WEIGHTS).items():
        if is_memory(name) and weight.ndim < 3:
            kept[name] = weight.bfloat16()
        elif is_memory(name):
            scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            kept[name], kept[name + SCALE] = (weight.float() / scale).round().to(torch.int8), scale
    with made_whole(file.with_suffix(".tmp"), file) as temporary:
        save_file(kept, temporary)


def unpack(converted: Path, file: Path, folder: Path) -> None:
    """Write a converted model's folder anew, with the memory of a file."""
    weights, kept = load_file(converted / WEIGHTS), load_file(file)
    for name in filter(is_memory, list(weights)):
        weights[name] = (kept[name].float() * kept.get(name + SCALE, torch.ones(()))).to(weights[name].dtype)
    with made_whole(folder.with_name(f"{folder.name}.tmp"), folder) as temporary:
        shutil.copytree(converted, temporary)
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[command](*map(Path, paths))
