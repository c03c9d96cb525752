"""Rollouts (paper, section 3.2): K tokens sampled from each chosen prefix, decoded from its state as one batch of R rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.records import inverse_cdf


@torch.no_grad()
def sample_rollouts(
    model: Any, snapshots: FastWeightCache, hidden: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample K tokens for each row; the first comes from the prefix's own last hidden state.

    Args:
        model: a causal model of this package.
        snapshots: states of R rows, read only.
        hidden: [R, D], final-norm output at each prefix's last token.
        u: [R, K] uniforms.
        temperature: logits are divided by it.

    Returns:
        tokens [R, K] long; log_probs [R, K] under the (tempered) distribution each was drawn from, nats; hidden states [R, K, D],
        the final-norm output after consuming token j.
    """
    cache = snapshots.detach()
    tokens, log_probs, states = [], [], []
    for j in range(u.shape[1]):
        logits = model.lm_head(hidden)
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        token = inverse_cdf(log_p.exp(), u[:, j].to(logits.device))
        hidden = model.model(token[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
        tokens.append(token)
        log_probs.append(log_p.gather(-1, token[:, None])[:, 0])
        states.append(hidden)
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), torch.stack(states, 1)
