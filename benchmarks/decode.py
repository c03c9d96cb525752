"""Measure the time of a decoded token and the memory of the state as the context grows from 1 k to 64 k tokens: both are flat."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from _timing import model_of


@torch.no_grad()
def measure(family: str, contexts: list[int], tokens: int, block: int) -> None:
    model = model_of(family).eval()
    g = torch.Generator().manual_seed(0)
    cache, seen, base = None, 0, None
    for context in contexts:
        while seen < context:
            n = min(block, context - seen)
            out = model(torch.randint(0, 4096, (1, n), generator=g), past_key_values=cache, logits_to_keep=1)
            cache, seen = out.past_key_values, seen + n
        seconds = []
        for _ in range(tokens):
            start = time.perf_counter()
            cache = model(torch.randint(0, 4096, (1, 1), generator=g), past_key_values=cache).past_key_values
            seconds.append(time.perf_counter() - start)
        seen += tokens
        median = statistics.median(seconds)
        base = base or median
        print(
            f"{family:15s} context {context:6d}  {median * 1e3:6.2f} ms/token ({median / base:.2f}x)  "
            f"state {cache.nbytes / 2**20:.2f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["delta_net", "gated_deltanet", "lact"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block", type=int, default=2048, help="tokens per prefill call")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for family in args.models:
        measure(family, args.contexts, args.tokens, args.block)


if __name__ == "__main__":
    main()
