"""Time forward and backward of the (gated) delta rule against transformers' torch_chunk_gated_delta_rule, on the same tensors."""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from _timing import alternate, matmul_peak, ratio
from refine_nsp.ops.delta_rule import delta_rule


def inputs(T: int, D: int, gated: bool) -> tuple:
    torch.manual_seed(0)
    q, v = torch.randn(1, T, 4, D, requires_grad=True), torch.randn(1, T, 4, D, requires_grad=True)
    k = torch.nn.functional.normalize(torch.randn(1, T, 4, D), dim=-1).requires_grad_()
    beta = torch.rand(1, T, 4).requires_grad_()
    return q, k, v, beta, (-torch.rand(1, T, 4)).requires_grad_() if gated else None


def measure(T: int, D: int, gated: bool, rounds: int) -> None:
    q, k, v, beta, g = inputs(T, D, gated)
    theirs_g = g if g is not None else torch.zeros(1, T, 4)
    ours_o, theirs_o = delta_rule(q, k, v, beta, g)[0], torch_chunk_gated_delta_rule(q, k, v, theirs_g, beta)[0]
    difference = float((ours_o - theirs_o).detach().abs().max())
    seconds = alternate(
        {
            "theirs": lambda: torch_chunk_gated_delta_rule(q, k, v, theirs_g, beta)[0].sum().backward(),
            "ours": lambda: delta_rule(q, k, v, beta, g)[0].sum().backward(),
        },
        rounds,
    )
    ours, theirs = (statistics.median(seconds[n]) * 1e3 for n in ("ours", "theirs"))
    kind = "gated" if gated else "plain"
    print(
        f"{kind}  T {T:5d}  4 heads of {D:3d}  ours {ours:7.1f} ms  theirs {theirs:7.1f} ms  "
        f"speed-up {ratio(seconds['theirs'], seconds['ours'])}  max difference {difference:.1e}"
    )


def profile(T: int, D: int, gated: bool, rounds: int = 5) -> None:
    """Print the share of the time that each kind of operation takes."""
    q, k, v, beta, g = inputs(T, D, gated)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        for _ in range(rounds):
            delta_rule(q, k, v, beta, g)[0].sum().backward()
    events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    shares = ", ".join(f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:8])
    print(f"{'gated' if gated else 'plain'}  T {T:5d}  4 heads of {D:3d}  {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="instead: where the time goes")
    args = parser.parse_args()
    if args.profile:
        torch.set_num_threads(args.threads)
        for D in (64, 128):
            for gated in (False, True):
                profile(4096, D, gated)
        return
    print(
        f"matmul peak, {args.threads} thread(s): {matmul_peak(args.threads) / 1e9:.0f} GFLOP/s; float32; ratio: median (min-max) of pairs"
    )
    for D in (64, 128):
        for T in (1024, 4096):
            for gated in (False, True):
                measure(T, D, gated, args.rounds)


if __name__ == "__main__":
    main()
