"""Measure documents that are read window by window with carried states: the peak memory beyond the model, and seconds a token.

    python benchmarks/carried_documents.py [--lengths 8192 32768 131072] [--window 2048]

`training` is one NTP step (forward and backward) for each window, from the state of the one before; `evaluation` is `evaluate`'s loss and
continuations of the whole document. Each measurement is of the shipped DeltaNet on one thread, in a process of its own.
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

SETTLE_WINDOWS = 2  # of a first document, after which the process has what it needs whatever the length


def measure(what: str, length: int, window: int) -> dict[str, float]:
    """Return the peak of resident bytes beyond those before the document, and the seconds it takes."""
    from refine_nsp import NSPConfig, load
    from refine_nsp.evaluation.documents import continuation_match, score_document
    from refine_nsp.nsp.records import Batch
    from refine_nsp.training.data import cut_windows
    from refine_nsp.training.lane_states import LaneStates
    from refine_nsp.training.phases import MicroBatch, NextToken

    torch.set_num_threads(1)
    model = load("refine-nsp/tiny-delta-net")[0].train(what == "training")
    phase, config = NextToken(NSPConfig()), NSPConfig(positions_per_sequence=8)

    def train(ids: list[int]) -> None:
        lanes = LaneStates(recent=0)
        for tokens in cut_windows(ids, window, 2, shared=1):
            model.zero_grad()
            row = torch.tensor([tokens])
            batch = MicroBatch(Batch.of(row, starts=lanes.starts((0,), row.device)), totals={"targets": len(tokens) - 1})
            phase.loss(model, batch)[0].backward()
            assert batch.left is not None
            lanes.keep((0,), batch.sequences, batch.left)

    def evaluate(ids: list[int]) -> None:
        score_document(model, ids, None, len(ids))
        continuation_match(model, ids, config, 0)

    def read(tokens: int) -> None:
        ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        (train if what == "training" else evaluate)(ids)

    read(SETTLE_WINDOWS * window)
    before = _timing.resident_bytes()
    start = time.perf_counter()
    with _timing.peak_resident() as peak:
        read(length)
    return {"resident": peak() - before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.window)))
        return
    # Freed memory goes back at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    print("| tokens | what | peak memory, MB | seconds |\n| --- | --- | --- | --- |")
    for what in ("training", "evaluation"):
        for length in args.lengths:
            command = [sys.executable, __file__, "--one", what, str(length), "--window", str(args.window)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            print(f"| {length:,} | {what} | {figures['resident'] / 1e6:,.0f} | {figures['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
