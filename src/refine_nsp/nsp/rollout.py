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
        snapshots: states of B*P prefixes, read only.
        hidden: [B*P, D], final-norm output at each prefix's last token.
        u: [R, K] uniforms, neighbouring rows for one prefix.
        temperature: logits are divided by it.

    Returns:
        tokens [R, K] long; log_probs [R, K] under the (tempered) distribution each was drawn from, nats; hidden states [R, K, D],
        the final-norm output after consuming token j.
    """
    N = u.shape[0] // hidden.shape[0]
    shared = model.model.shares_states
    cache = snapshots.detach() if shared else snapshots.detach().expand(N)
    hidden = hidden.repeat_interleave(N, 0)
    tokens: list[Tensor] = []
    log_probs, states = [], []
    for j in range(u.shape[1]):
        logits = model.lm_head(hidden)
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        token = inverse_cdf(log_p.exp(), u[:, j].to(logits.device))
        tokens.append(token)
        # From a shared state the few tokens so far are run again, which is cheaper than R states to keep and carry on.
        again = torch.stack(tokens, 1) if shared else token[:, None]
        hidden = model.model(again, past_key_values=cache, use_cache=not shared).last_hidden_state[:, -1]
        log_probs.append(log_p.gather(-1, token[:, None])[:, 0])
        states.append(hidden)
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), torch.stack(states, 1)
