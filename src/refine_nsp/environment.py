"""What a run was made with (versions, machine, seed, commit), and how its process keeps memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("refine-nsp", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def environment(seed: int | None = None) -> dict[str, Any]:
    """Plain facts for environment.json. No paths, no host name."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    facts |= {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "seed": seed}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        facts["commit"] = commit.stdout.strip() or None
    except OSError:
        facts["commit"] = None
    return facts


# mallopt's numbers for what these are called in glibc, and values: never give back, use the heap up to the largest size it allows.
MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, where the C library can be told so (glibc); whether it was.

    A training step allocates and frees the same tensors over and over. Given back to the system in between, each of their pages has to
    be asked for, cleared and mapped again: a sixth of a step's time on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(setting, value) for setting, value in MALLOC_SETTINGS.items()]  # every one of them, refused or not
    return all(accepted)
