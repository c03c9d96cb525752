"""Time candidates on a noisy machine: they take turns in one run, and ratios of medians are reported."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from refine_nsp.models import DeltaNetForCausalLM
    from refine_nsp.models.blocks import FastWeightForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Time each candidate in seconds, in turn, `rounds` times after `warm_up` uncounted rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + warm_up):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> str:
    """Return the median of a/b, pair by pair, with the least and the greatest pair."""
    pairs = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(pairs):.2f} ({pairs[0]:.2f}-{pairs[-1]:.2f})"


def matmul_peak(threads: int, size: int = 1536, rounds: int = 7) -> float:
    """Measure this machine's best rate of float32 matrix products, in FLOP/s."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = alternate({"mm": lambda: a @ b}, rounds)["mm"]
    return 2 * size**3 / min(times)


def delta_net_12m() -> DeltaNetForCausalLM:
    """Build the DeltaNet of these benchmarks: 12.2 M parameters (6 layers of 384, 6 heads of 64, vocabulary 4096, tied)."""
    from refine_nsp.models import DeltaNetConfig, DeltaNetForCausalLM

    torch.manual_seed(0)
    return DeltaNetForCausalLM(DeltaNetConfig(**SIZES, num_heads=6)).train()


SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024, "vocab_size": 4096, "tie_word_embeddings": True}


def model_of(family: str) -> FastWeightForCausalLM:
    """Build a model of about 12 M parameters of a family."""
    from refine_nsp.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, LaCTConfig, LaCTForCausalLM

    if family == "delta_net":
        return delta_net_12m()
    torch.manual_seed(0)
    if family == "gated_deltanet":
        config = GatedDeltaNetConfig(**SIZES, num_heads=6, head_dim=64, expand_v=1.0)
        return GatedDeltaNetForCausalLM(config).train()
    config = LaCTConfig(**SIZES, num_attn_heads=6, num_lact_heads=2, lact_chunk_size=512, window_size=512, w0_w2_low_rank=32)
    return LaCTForCausalLM(config).train()


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_resident(every_seconds: float = 0.005) -> Iterator[Callable[[], int]]:
    """Watch the memory of the process inside the block; the function that is given returns its peak."""
    seen, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(every_seconds):
            seen[0] = max(seen[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        watcher.join()
