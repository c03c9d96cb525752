"""Record what a run was made with (versions, machine, seed, commit), and set how its process keeps memory and waits."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "refine-nsp", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "numpy", "scipy", "rouge",
    "wonderwords",
)  # fmt: skip
OPTIONAL_PACKAGES = ("flash-linear-attention", "fla-core", "triton", "lm-eval")
GIB = 2**30


@lru_cache  # a running process keeps the code that it has loaded, and training writes this into every checkpoint's folder
def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(seed: int | None = None) -> dict[str, object]:
    """Collect plain facts for environment.json, without paths and without the host's name."""
    import torch

    facts: dict[str, object] = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    facts |= {name: installed(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)}
    facts |= {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "seed": seed}
    return facts | {"commit": commit_of(Path(__file__).resolve())}


@lru_cache  # likewise: what runs is what was there when it was loaded
def commit_of(file: Path) -> str | None:
    """Return the commit of the repository that keeps a file; None where none does, even if the file lies within a repository."""
    at = ["git", "-C", str(file.parent)]
    try:
        kept = subprocess.run([*at, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=10, check=False)
        commit = subprocess.run([*at, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None if kept.returncode == 0 else None


def memory_available() -> int | None:
    """Return the bytes of memory that a process may still take, swap included; None where the system does not say (other than Linux).

    A container's limit counts as a whole, because what is used of it holds pages that can be given back.
    """
    if not sys.platform.startswith("linux"):
        return None
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(free, int(limit.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return free


def devices() -> list[dict[str, str]]:
    """Describe the machine's processor and its CUDA devices: their memory, and how they compute bfloat16."""
    import psutil
    import torch

    memory, processor = psutil.virtual_memory(), torch.backends.cpu.get_cpu_capability()
    own = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
    found = [{
        "device": "cpu",
        "name": f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "bfloat16": "by the processor" if own else "emulated, slower than float32",
    }]  # fmt: skip
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        found.append({
            "device": f"cuda:{i}",
            "name": f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, CUDA {torch.version.cuda or torch.version.hip}",
            "memory": f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
            "bfloat16": "by the device" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated, slower than float32",
        })  # fmt: skip
    return found


# The numbers of glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD for mallopt, with values by which memory is never given back and
# the heap serves allocations up to the largest size that glibc allows.
MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, where the C library (glibc) can be told so. Return whether it was told.

    A training step allocates and frees the same tensors over and over. To get their pages from the system each time takes a sixth of a
    step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return False
    accepted = [mallopt(setting, value) for setting, value in MALLOC_SETTINGS.items()]  # all are made, even if one is refused
    return all(accepted)


SPINS = 1000  # turns of waiting, some microseconds in all


def wait_without_spinning() -> None:
    """Let threads that wait for each other give up their cores soon. GNU's OpenMP reads this setting when torch loads it.

    By default they spin much longer. On idle cores that gains a little (docs/costs.md); where another program keeps a core busy, a step on
    two threads took ten times as long as on one. A user's own value of either variable is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


@contextmanager
def without_garbage_searches() -> Iterator[None]:
    """Let Python search for no garbage while libraries are loaded, and leave what they hold out of every later search.

    Loading makes a million objects that stay, and hardly any garbage. Searching them again and again takes a fifth of the time that a
    command needs to begin, and every training ends with a search.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if searching:
            gc.enable()
