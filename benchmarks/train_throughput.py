"""Measure a plain training step of the 12 M model: tokens per second, share of the machine's matmul peak, and where the time goes."""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

from _timing import alternate, delta_net_12m, matmul_peak
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch


def matmul_flops(model: FastWeightForCausalLM, T: int, chunk: int = 64) -> float:
    """Count the FLOP of all matrix products of a forward and backward pass over T tokens (elementwise work is not counted).

    Linear layers and head: 6 per weight and token (2 forward, 4 backward). Delta rule, per head and chunk of C tokens, width D: forward
    5 products of C*C*D and 3 of C*D*D, backward 8 and 6, 2 FLOP each.
    """
    c = model.config
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    D, C = c.hidden_size // c.num_heads, chunk
    per_chunk = 2 * (13 * C * C * D + 9 * C * D * D)
    return 6.0 * linear * T + c.num_hidden_layers * c.num_heads * (T / C) * per_chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    peak = matmul_peak(args.threads)
    model = delta_net_12m()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 4096, (1, args.length), generator=torch.Generator().manual_seed(0))
    batch = Batch.of(ids)

    def step() -> None:
        hidden = model.model(ids, use_cache=False).last_hidden_state
        next_token_loss(model, hidden, batch, batch.num_targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    seconds = alternate({"step": step}, args.rounds, warm_up=2)["step"]
    median, flops = statistics.median(seconds), matmul_flops(model, args.length)
    peak = max(peak, matmul_peak(args.threads))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, T {args.length}, float32, {args.threads} threads"
    )
    print(
        f"step {median:.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), {args.length / median:,.0f} tokens/s, "
        f"{flops / 1e9:.0f} GFLOP in matrix products"
    )
    print(f"{flops / median / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s: {flops / median / peak:.0%} of the matmul peak")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    rows = sorted(record.key_averages(), key=lambda r: -r.self_cpu_time_total)
    total = sum(r.self_cpu_time_total for r in rows)
    for r in rows[:14]:
        print(f"    {r.self_cpu_time_total / total:5.1%}  {r.key}  ({r.count} calls)")


if __name__ == "__main__":
    main()
