"""Rollouts (paper, section 3.2): K tokens sampled from each chosen prefix, decoded from its state as one batch of R rows."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.passes import Pass
from refine_nsp.nsp.records import Prefixes, Rollouts, inverse_cdf
from refine_nsp.nsp.selection import count_positions


@torch.no_grad()
def sample(whole: Pass, prefixes: Prefixes, config: NSPConfig, u: Tensor) -> Rollouts:
    """N rollouts of K tokens from each prefix, by uniforms [B, P, N, K]; not judged yet."""
    start = time.perf_counter()
    tokens, log_probs, hidden = sample_rollouts(
        whole.model, prefixes.cache.detach(), prefixes.hidden.detach(), u.reshape(-1, u.shape[-1]), config.temperature
    )
    seconds = {"seconds_select": start - whole.finished, "seconds_rollout": time.perf_counter() - start}
    none = log_probs.new_zeros(u.shape[:3])
    return Rollouts(
        prefixes.positions, tokens.view(u.shape), log_probs.view(u.shape), hidden.view(*u.shape, -1), none, none, none,
        int(count_positions(whole.batch.host_lengths, config).sum()), seconds,
    )  # fmt: skip


@torch.no_grad()
def sample_rollouts(
    model: FastWeightForCausalLM, snapshots: FastWeightCache, hidden: Tensor, u: Tensor, temperature: float
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
