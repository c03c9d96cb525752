"""The cross-entropy of the next token, L_ntp (paper, section 3.4), which also says how sure and how right every prediction was."""

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
    """Sum the cross-entropies of real targets, divided by `normalizer`; return the loss and statistics of every prediction, [B*T].

    hidden: [B, T, D], final-norm output. normalizer: a number, or [B] for each sequence's sum; None: the number of targets.
    """
    weights = target_weights(batch, normalizer, hidden.dtype)
    return linear_cross_entropy(hidden.flatten(0, 1), head_weight(model), next_tokens(batch), weights)


def next_tokens(batch: Batch) -> Tensor:
    """Give the token after each token, [B*T] long; 0 after the last of a row."""
    return F.pad(batch.input_ids[:, 1:], (0, 1)).flatten()


def target_weights(batch: Batch, normalizer: Normalizer, dtype: torch.dtype) -> Tensor:
    """Weigh real targets by 1 / normalizer (None: by 1 / their number) and everything else by 0; [B*T], float32 or better."""
    divisor = max(batch.num_targets, 1) if normalizer is None else by_sequence(normalizer)
    return (batch.target_mask.to(torch.promote_types(dtype, torch.float32)) / divisor).flatten()


def by_sequence(normalizer: float | Tensor) -> float | Tensor:
    """Shape a normalizer for division of [B, T]: one for each sequence [B] becomes [B, 1], one for all stays as it is."""
    return normalizer[:, None] if isinstance(normalizer, Tensor) and normalizer.ndim == 1 else normalizer
