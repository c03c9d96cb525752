"""A teacher is a frozen model: it says what it predicts with all of a text before it, and how much of that needs what is far.

Its score of a token, d[t] = KL(p(.|whole prefix) || p(.|window)), needs no label and no student: where it is 0, a model with a window alone
can predict as well. A teacher that is attention alone is read with a window on its layers by masks, so that every token from the W-th on
is scored; one with states is read in local windows, as a student is (`context.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.models import read_in_window
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.context import context_divergence, divergence
from refine_nsp.nsp.next_token import next_tokens
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.memory import part


@dataclass(frozen=True)
class Teacher:
    """Hold a frozen model that predictions are learned from."""

    model: CausalModel  # in eval mode
    masked: bool  # masks put the window on its layers; else it is read in local windows

    @property
    def head(self) -> Tensor:
        """Give the weight [V, D] that makes logits of its hidden states."""
        return head_weight(self.model)

    @part("teacher")
    @torch.no_grad()
    def read(self, batch: Batch) -> Tensor:
        """Read whole sequences; return the final-norm output [B, T, D]."""
        hidden: Tensor = self.model.model(batch.input_ids, lengths=batch.lengths, use_cache=False).last_hidden_state
        return hidden

    @part("teacher")
    @torch.no_grad()
    def scores(self, batch: Batch, hidden: Tensor, config: NSPConfig, gain: bool = False) -> Tensor:
        """Compute d [B, T], float32 or better; 0 where nothing is beyond the window.

        Args:
            hidden: [B, T, D], what `read` returned for the batch.
            config: `local_window` (W); and `local_span`, where the teacher is read in local windows.
            gain: how much the whole prefix helps the true token instead, max(0, log p(x|whole prefix) - log p(x|window)).
        """
        if not self.masked:
            return context_divergence(self.model, replace(batch, scores=None), hidden, config, gain)
        W = config.local_window
        d = hidden.new_zeros(batch.input_ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        if d.shape[1] <= W:
            return d
        local = read_in_window(self.model.model, batch.input_ids, W)[:, W:]
        targets = next_tokens(batch).view(d.shape)[:, W:]
        d[:, W:] = divergence(self.head, hidden[:, W:], local, targets, gain)
        # Without a target (or at a pad) there is nothing to gain.
        return d.masked_fill_(~(batch.target_mask if gain else batch.real), 0.0)


def scores_beyond(W: int) -> NSPConfig:
    """Make the settings of scores that compare with a window of W tokens, or with the least more where it is made of local windows."""
    return NSPConfig(estimator="closed_form", token_weights="context", local_window=W, local_span=2)


def beyond_window(batch: Batch, W: int) -> Tensor:
    """Mark the real targets whose prediction can need more than the last W tokens; [B, T] bool."""
    mask = batch.target_mask.clone()
    mask[:, :W] = False
    return mask


def token_weights(batch: Batch, scores: Tensor | None, lambda_context: float, dtype: torch.dtype) -> Tensor:
    """Weigh real targets by 1 + lambda_context * d[t], and everything else by 0; [B, T] of `dtype`. Every token counts: far ones alone
    would let the first window decay."""
    ones = batch.target_mask.to(dtype)
    return ones if scores is None else ones * (1 + lambda_context * scores)
