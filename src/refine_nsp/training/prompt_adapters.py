"""Several prompts in one batch have LoRA adapters of their own: row b of every linear layer's input goes through adapter b.

PEFT trains one adapter for a whole batch; test-time training wants one per prompt. Rows may be multiples of the prompts (snapshots and
rollouts are expanded row-major), so row r belongs to prompt r // (rows / B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BatchLoRA:
    """Give every prompt a low-rank adapter on each of the linear layers: y += (alpha / r) * x A_b B_b.

    B starts at 0, so the model starts unchanged (Hu et al., 2021). A is the same for every prompt, drawn from `seed`: a prompt's
    adaptation does not depend on what else is in the batch.
    """

    def __init__(self, layers: Sequence[nn.Linear], prompts: int, rank: int, alpha: float, seed: int) -> None:
        self.prompts, self.scale = prompts, alpha / rank
        generator = torch.Generator().manual_seed(seed)
        self.layers = list(layers)
        self.down: list[nn.Parameter] = []
        self.up: list[nn.Parameter] = []
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.in_features)
            a = (torch.rand(layer.in_features, rank, generator=generator) * 2 - 1) * bound
            a = a.to(layer.weight).expand(prompts, -1, -1)
            self.down.append(nn.Parameter(a.clone()))
            self.up.append(nn.Parameter(layer.weight.new_zeros(prompts, rank, layer.out_features)))

    def parameters(self) -> list[nn.Parameter]:
        """List all adapters' tensors, each [B, ...]."""
        return [*self.down, *self.up]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the adapters on their layers, and take them off again afterwards, whatever happened."""
        handles = [layer.register_forward_hook(self._hook(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Make the hook that adds adapter i to what its layer gives."""

        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if x.shape[0] % self.prompts:
                raise ValueError(f"{x.shape[0]} rows are no multiple of {self.prompts} prompts")
            rows = x.reshape(self.prompts, -1, x.shape[-1])
            return output + self.scale * (rows @ self.down[i] @ self.up[i]).view_as(output)

        return add
