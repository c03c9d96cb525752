"""Refuse to load weights that the machine has no memory for, before any of them is read."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from refine_nsp.environment import memory_available
from refine_nsp.errors import RefineError
from refine_nsp.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTIAL_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's: only the first process of a machine reads weights


def check_room(where: str, config: PreTrainedConfig, dtype: torch.dtype | str | None, given: Collection[str]) -> None:
    """Refuse a checkpoint whose weights, in the dtype asked for, take more memory than the machine has left.

    What cannot be known is not refused: weights that are not on this machine yet, are stored quantised, go elsewhere as they are read
    (device_map, shards of FSDP or DeepSpeed), or belong to other kinds of input; and systems that do not say how much is left.

    Args:
        where: a folder or a hub name. dtype: None or "auto" is the checkpoint's own. given: what else `from_pretrained` is told.

    Raises:
        RefineError: how much the weights take, how much there is, and what would make them smaller.
    """
    shared_out = is_deepspeed_zero3_enabled() or os.environ.get(PARTIAL_LOADING, "").lower() in ("1", "true")
    partial = config is not config.get_text_config(decoder=True) or "quantization_config" in vars(config)
    free, files = memory_available(), weight_files(where)
    if shared_out or partial or "device_map" in given or free is None or not files:
        return
    own = config.dtype if dtype in (None, "auto") else dtype
    tied = config.to_dict().get("tie_word_embeddings")
    wanted = getattr(torch, own) if isinstance(own, str) else own
    try:
        counts = [_numbers(path) for path in files]
        numbers = sum(count for of_file in counts for name, count in of_file.items() if not (tied and name == "lm_head.weight"))
        need = sum(path.stat().st_size for path in files) if wanted is None else numbers * wanted.itemsize
    except (SafetensorError, OSError):  # a damaged file is named where it is read
        return
    if need <= free:
        return
    smaller = (
        f"load them in bfloat16 (dtype), which takes {2 * numbers / 1e9:.1f} GB" if need > 3 * numbers else "take a smaller model"
    )
    raise RefineError(
        f"the weights of {where} take {need / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free: {smaller}, end what else uses "
        "memory, or use a machine with more"
    )


def weight_files(where: str) -> list[Path]:
    """Find the safetensors files of a folder, or of a hub name in the cache, as transformers does; none where they are not there."""
    folder = Path(where)
    if not folder.is_dir():
        config = try_to_load_from_cache(where, "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        return []
    named = read_json(folder / INDEX, "an index of safetensors shards").get("weight_map")
    files = sorted({folder / str(name) for name in named.values()}) if isinstance(named, dict) else []
    return files if all(path.exists() for path in files) else []


def _numbers(path: Path) -> dict[str, int]:
    """Count the numbers of each weight in a safetensors file, by its header alone."""
    with safe_open(path, framework="pt") as file:
        return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
