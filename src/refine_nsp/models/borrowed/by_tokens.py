"""The tokens of a prefix serve as its state: exact for any model, at the price of reading every prefix again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.models.borrowed.trunk import StatefulTrunk
from refine_nsp.models.state import FastWeightCache, TakeStates, consumed_tokens, states_after


class ByTokens:
    """The state of a prefix is its tokens, newest last, read again with what follows. It has the calls of `ByReference`."""

    rereads_prefixes = True
    keeps_all_tokens = True

    def __init__(self, trunk: StatefulTrunk) -> None:
        self.trunk = trunk

    def run(self, x: Tensor, past: FastWeightCache | None) -> Tensor:
        return self.run_and_keep(x, past)[0]

    def run_and_take(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor) -> tuple[Tensor, FastWeightCache]:
        hidden, take = self.run_and_keep(x, past)
        return hidden, take(wanted)

    def run_and_keep(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, TakeStates]:
        if x.ndim == 3:
            raise RefineError(f"inputs_embeds cannot be read again, as states of {self.trunk.label} are; pass input_ids")
        B, T = x.shape
        lengths = consumed_tokens(past, B)
        columns = int(lengths.max())
        if past is None or columns == 0:
            return self.trunk.plain(x, use_cache=False), partial(states_of, x, lengths, 0)
        whole = torch.cat([past.layers[0]["tokens"][:, -columns:], x], 1)
        # Without the holes at their starts the rows begin at the left, where no mask is needed.
        shift = (torch.arange(columns + T) + (columns - lengths)[:, None]).clamp(max=columns + T - 1)
        hidden = self.trunk.plain(whole.gather(1, shift.to(x.device, non_blocking=True)), use_cache=False)
        new = (lengths[:, None] + torch.arange(T)).to(x.device, non_blocking=True)
        return hidden.gather(1, new[..., None].expand(-1, -1, hidden.shape[-1])), partial(states_of, whole, lengths, columns)


def states_of(tokens: Tensor, lengths: Tensor, columns: int, positions: Tensor) -> FastWeightCache:
    """Cut tokens [B, columns + T] behind `positions` [B, P] of a pass; lengths [B] are the past's, whose hole is at the start."""
    states = states_after([], lengths, positions)
    ends = (columns + positions + 1).flatten()
    kept = (ends[:, None] - states.columns + torch.arange(states.columns)).clamp(min=0).to(tokens.device, non_blocking=True)
    rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(positions.shape[1])
    states.layers = [{"tokens": tokens[rows[:, None], kept]}]
    return states
