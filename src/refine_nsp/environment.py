"""What a run was made with: versions, machine, seed, commit."""

from __future__ import annotations

import os
import platform
import subprocess
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
