"""Measure a long sequence in one piece and by segments: the peak memory beyond the model, the bytes that `estimate` counts, and seconds.

    python benchmarks/long_context.py [--lengths 8192 32768 131072] [--segment_tokens 4096] [--longest_whole 32768]

Each measurement is one NTP step (forward and backward) of the shipped DeltaNet on one thread, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch

import _timing

SETTLE_TOKENS = 1024  # of a first step, after which the process has what it needs whatever the length


def measure(length: int, segment: int) -> dict[str, float]:
    """Return the peak of resident bytes beyond those before the step, and the seconds of the step."""
    from refine_nsp import NSPConfig, load
    from refine_nsp.estimate.counter import Counter
    from refine_nsp.nsp.records import Batch
    from refine_nsp.training.phases import MicroBatch, NextToken

    torch.set_num_threads(1)
    model = load("refine-nsp/tiny-delta-net")[0].train()
    phase = NextToken(NSPConfig(segment_tokens=segment or None))

    def step(tokens: int) -> None:
        model.zero_grad()
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        phase.loss(model, MicroBatch(Batch.of(ids), totals={"targets": tokens - 1}))[0].backward()

    with Counter() as counter:
        step(length)
    step(SETTLE_TOKENS)
    before = _timing.resident_bytes()
    start = time.perf_counter()
    with _timing.peak_resident() as peak:
        step(length)
    return {"resident": peak() - before, "counted": max(counter.peaks.values()), "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--segment_tokens", type=int, default=4096)
    parser.add_argument("--longest_whole", type=int, default=32768, help="longer ones are run by segments only")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    # Freed memory goes back at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    print("| tokens | by | peak memory, MB | counted, MB | seconds |\n| --- | --- | --- | --- | --- |")
    for length in args.lengths:
        for segment in (0, args.segment_tokens):
            if (segment == 0 and length > args.longest_whole) or segment >= length:
                continue
            command = [sys.executable, __file__, "--one", str(length), str(segment)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            memory = " | ".join(f"{figures[name] / 1e6:,.0f}" for name in ("resident", "counted"))
            print(
                f"| {length:,} | {f'{segment:,}' if segment else 'one piece'} | {memory} | {figures['seconds']:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
