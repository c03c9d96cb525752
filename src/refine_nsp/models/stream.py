"""Write a safetensors file weight by weight, so that no more than one of them is in memory.

The format is eight bytes of length, a JSON header with each tensor's place, and the tensors' bytes
(https://github.com/huggingface/safetensors#format); the library's own writer wants all of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from refine_nsp.errors import RefineError

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Write weights of one dtype in the order of `shapes`, in which `weights` must bring them.

    Raises:
        RefineError: a weight of another name or shape than announced, or one that is not finite.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        announced = iter(shapes.items())
        for name, weight in weights:
            if next(announced, None) != (name, tuple(weight.shape)):
                raise RefineError(f"{name} has shape {list(weight.shape)}; expected {list(shapes.get(name, ()))}")
            if not weight.isfinite().all():
                raise RefineError(f"{name} is not finite everywhere; the source is damaged, or {dtype} cannot hold it")
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if (left := next(announced, None)) is not None:
            raise RefineError(f"{left[0]} was not written")
