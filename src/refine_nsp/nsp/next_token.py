"""The cross-entropy of the next token, L_ntp (paper, section 3.4), with the statistics of every prediction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch, Normalizer
from refine_nsp.ops.linear_cross_entropy import TokenStats, linear_cross_entropy
from refine_nsp.ops.memory import part


@part("logits")
def next_token_loss(model: CausalModel, hidden: Tensor, batch: Batch, normalizer: Normalizer = None) -> tuple[Tensor, TokenStats]:
    """Sum of cross-entropies over real targets / normalizer, and per-token statistics at every token [B*T]."""
    weights = target_weights(batch, normalizer, hidden.dtype)
    return linear_cross_entropy(hidden.flatten(0, 1), head_weight(model), next_tokens(batch), weights)


def next_tokens(batch: Batch) -> Tensor:
    """[B*T] long: the token after each, 0 after the last."""
    return F.pad(batch.input_ids[:, 1:], (0, 1)).flatten()


def target_weights(batch: Batch, normalizer: Normalizer, dtype: torch.dtype) -> Tensor:
    """[B*T]: 1 / normalizer at real targets, 0 elsewhere, float32 or better; by default divided by their number."""
    divisor = max(batch.num_targets, 1) if normalizer is None else by_sequence(normalizer)
    return (batch.target_mask.to(torch.promote_types(dtype, torch.float32)) / divisor).flatten()


def by_sequence(normalizer: float | Tensor) -> float | Tensor:
    """A normalizer of each sequence [B] as [B, 1]; one for all as it is."""
    return normalizer[:, None] if isinstance(normalizer, Tensor) and normalizer.ndim == 1 else normalizer
