"""Count the operations that an update of LaCT's fast weights takes for a chunk and a layer; on a GPU each is a launch.

They are counted on a CPU, from the difference between ten chunks and six.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from refine_nsp.models import LaCTConfig, LaCTForCausalLM

CHUNK, FEW, MANY = 32, 6, 10
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attn_heads": 2, "num_lact_heads": 2, "num_hidden_layers": 1, "vocab_size": 256, "w0_w2_low_rank": 8
}  # fmt: skip
# Views and allocations, which compute nothing.
FREE = set(
    "view reshape _reshape_alias _unsafe_view as_strided alias detach expand transpose t permute unsqueeze squeeze slice select narrow "
    "split chunk unbind flatten unflatten empty empty_like empty_strided zeros_like resize_ result_type lift lift_fresh item is_nonzero "
    "_local_scalar_dense resolve_conj".split()
)


def operations(run: Callable[[], Any]) -> tuple[int, Any]:
    """Count the torch operations that compute and call no other that does, and return what `run` returned."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = run()

    def computes(event: Any) -> bool:
        return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in FREE

    return sum(computes(e) and not any(computes(c) for c in e.cpu_children) for e in seen.events()), result


def step(muon: bool, chunks: int) -> tuple[int, int]:
    """Count the operations of a forward and a backward pass over so many chunks, in bfloat16."""
    torch.manual_seed(0)
    model = LaCTForCausalLM(LaCTConfig(**SIZES, lact_chunk_size=CHUNK, window_size=CHUNK, use_muon=muon)).to(torch.bfloat16)
    ids = torch.randint(0, SIZES["vocab_size"], (1, CHUNK * chunks))
    model(input_ids=ids, labels=ids).loss.backward()  # gradients are there, to be added to
    forward, loss = operations(lambda: model(input_ids=ids, labels=ids).loss)
    return forward, operations(loss.backward)[0]


def main() -> None:
    for muon in (False, True):
        few, many = step(muon, FEW), step(muon, MANY)
        forward, backward = ((b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True))
        print(f"{'with' if muon else 'without'} Muon: {forward:.0f} operations forward, {backward:.0f} backward")


if __name__ == "__main__":
    main()
