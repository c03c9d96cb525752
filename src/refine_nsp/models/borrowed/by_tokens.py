"""The tokens of a prefix serve as its state: exact for any model, at the price of reading every prefix again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.models.borrowed.trunk import StatefulTrunk
from refine_nsp.models.state import FastWeightCache, consumed_tokens


class ByTokens:
    """The state of a prefix is its tokens, newest last; what follows is read together with them."""

    rereads_prefixes = True
    keeps_all_tokens = True

    def __init__(self, trunk: StatefulTrunk) -> None:
        self.trunk = trunk

    def run(self, x: Tensor, past: FastWeightCache | None) -> Tensor:
        return self.run_and_keep(x, past)[0]

    def run_and_take(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor) -> tuple[Tensor, FastWeightCache]:
        hidden, states = self.run_and_keep(x, past)
        return hidden, states.at(wanted)

    def run_and_keep(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, Tokens]:
        if x.ndim == 3:
            raise RefineError(
                f"inputs_embeds cannot be read again, which is how states of {self.trunk.label} are kept; pass input_ids"
            )
        B, T = x.shape
        lengths = consumed_tokens(past, B)
        columns = int(lengths.max())
        if past is None or columns == 0:
            return self.trunk.plain(x, use_cache=False), Tokens(x, lengths, 0)
        whole = torch.cat([past.layers[0]["tokens"][:, -columns:], x], 1)
        # Without the holes at their starts the rows begin at the left, where no mask is needed.
        shift = (torch.arange(columns + T) + (columns - lengths)[:, None]).clamp(max=columns + T - 1)
        hidden = self.trunk.plain(whole.gather(1, shift.to(x.device, non_blocking=True)), use_cache=False)
        new = (lengths[:, None] + torch.arange(T)).to(x.device, non_blocking=True)
        return hidden.gather(1, new[..., None].expand(-1, -1, hidden.shape[-1])), Tokens(whole, lengths, columns)


@dataclass(frozen=True)
class Tokens:
    """Holds the tokens [B, columns + T] of the past and of a pass; lengths: [B], the past's, whose hole is at the start."""

    tokens: Tensor
    lengths: Tensor
    columns: int

    def at(self, positions: Tensor) -> FastWeightCache:
        """See `StatesOfPass.at`."""
        lengths = (self.lengths[:, None] + positions + 1).flatten()
        width = int(lengths.max()) if len(lengths) else 0
        ends = (self.columns + positions + 1).flatten()
        columns = (ends[:, None] - width + torch.arange(width)).clamp(min=0).to(self.tokens.device, non_blocking=True)
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(positions.shape[1])
        return FastWeightCache([{"tokens": self.tokens[rows[:, None], columns]}], lengths, width)
