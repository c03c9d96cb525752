"""Forward + backward of the (gated) delta rule against transformers' torch_chunk_gated_delta_rule, on the same tensors, in one run."""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from _timing import alternate, matmul_peak, ratio
from refine_nsp.ops.delta_rule import delta_rule


def measure(T: int, D: int, gated: bool, rounds: int) -> None:
    torch.manual_seed(0)
    q, v = torch.randn(1, T, 4, D, requires_grad=True), torch.randn(1, T, 4, D, requires_grad=True)
    k = torch.nn.functional.normalize(torch.randn(1, T, 4, D), dim=-1).requires_grad_()
    beta = torch.rand(1, T, 4).requires_grad_()
    g = (-torch.rand(1, T, 4)).requires_grad_() if gated else None
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(
        f"matmul peak, {args.threads} thread(s): {matmul_peak(args.threads) / 1e9:.0f} GFLOP/s; float32; ratio: median (min-max) of pairs"
    )
    for D in (64, 128):
        for T in (1024, 4096):
            for gated in (False, True):
                measure(T, D, gated, args.rounds)


if __name__ == "__main__":
    main()
