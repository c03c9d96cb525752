"""Continue rows from states token by token: the rollouts of a prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_nsp.models.protocols import Trunk
from refine_nsp.models.state import FastWeightCache


class Branches:
    """Continues n neighbouring rows from each of the S states of a cache, R = S*n, a token at a time; the cache is only read."""

    def __init__(self, model: Trunk, cache: FastWeightCache, n: int) -> None:
        self.model = model
        self.shared = all(mixer.shares_states for mixer in model.mixers)
        self.cache = cache if self.shared else cache.expand(n)
        self.tokens: list[Tensor] = []

    def advance(self, token: Tensor) -> Tensor:
        """Consume a token a row, [R] long, and return the final-norm output after it [R, D]."""
        if not self.shared:
            return self.model(token[:, None], past_key_values=self.cache, use_cache=True).last_hidden_state[:, 0]
        # Running the few tokens so far again from shared states is cheaper than keeping and updating a state for every row.
        self.tokens.append(token)
        again = torch.stack(self.tokens, 1)
        return self.model(again, past_key_values=self.cache, use_cache=False).last_hidden_state[:, -1]
