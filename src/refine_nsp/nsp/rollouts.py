"""Sample rollouts (paper, section 3.2): K tokens from each chosen prefix, decoded from its state as one batch of R rows.

Greedy ones measure how well the text is continued.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import torch
from torch import Tensor

from refine_nsp.models.branches import Branches
from refine_nsp.models.generation import end_tokens
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.forward import Forward
from refine_nsp.nsp.records import Metrics, Prefixes, Sampled, gather_positions, inverse_cdf
from refine_nsp.nsp.rewards import cosine
from refine_nsp.nsp.selection import count_positions
from refine_nsp.ops.linear_cross_entropy import log_softmax
from refine_nsp.ops.memory import part


@part("rollouts")
@torch.no_grad()
def sample(forward: Forward, prefixes: Prefixes) -> Sampled:
    """Sample N rollouts of K tokens from each prefix, by the step's draws; as published, no rollout ends."""
    model, config, u, batch = forward.work.model, forward.work.config, forward.work.draws.tokens, forward.work.batch
    start = time.perf_counter()
    tokens, log_probs, hidden = sample_tokens(
        model,
        prefixes.cache.detach(),
        prefixes.hidden.detach(),
        u.reshape(-1, u.shape[-1]),
        config.temperature,
        never=end_tokens(model) if config.published else (),
    )
    seconds: Metrics = {"seconds_select": start - forward.finished, "seconds_rollout": time.perf_counter() - start}
    return Sampled(
        positions=prefixes.positions,
        tokens=tokens.view(u.shape),
        log_probs=log_probs.view(u.shape),
        hidden=hidden.view(*u.shape, -1),
        num_positions=int(count_positions(batch.text_lengths, config, batch.consumed).sum()),
        metrics=seconds,
    )


@torch.no_grad()
def sample_tokens(
    model: CausalModel,
    snapshots: FastWeightCache,
    hidden: Tensor,
    u: Tensor,
    temperature: float,
    never: Collection[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample K tokens for each row; the first comes from the prefix's own last hidden state.

    Args:
        snapshots: states of B*P prefixes, read only.
        hidden: [B*P, D], final-norm output at each prefix's last token.
        u: [R, K] uniforms, neighbouring rows for one prefix.
        never: tokens that are not drawn. The published code keeps EOS out in this way, and still takes log-probabilities of all tokens.

    Returns:
        tokens [R, K] long; log_probs [R, K] under the (tempered) distribution of all tokens, nats; hidden states [R, K, D], the final-norm
        output after consuming token j.
    """
    rows = Branches(model.model, snapshots, u.shape[0] // hidden.shape[0])
    u = u.to(hidden.device, non_blocking=True)
    tokens, log_probs, states = [], [], []
    for j in range(u.shape[1]):
        # Of B*P rows for the first token, whose distribution the rollouts of a prefix share; then of R.
        log_p = log_softmax(model.lm_head(hidden), temperature)
        chances = log_p.exp()
        for unwanted in never:
            chances[:, unwanted] = 0
        token = inverse_cdf(chances, u[:, j].view(len(hidden), -1))
        tokens.append(token.flatten())
        log_probs.append(log_p.gather(-1, token).flatten())
        hidden = rows.advance(tokens[-1])
        states.append(hidden)
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), torch.stack(states, 1)


def greedy_match(
    model: CausalModel, input_ids: Tensor, true_states: Tensor, prefixes: Prefixes, K: int
) -> tuple[float, float, int]:
    """Compare K greedy tokens from each of the prefixes with the text.

    Args:
        input_ids: [B, T] long. true_states: [B, T, D], the final-norm output after consuming each token of the text.

    Returns:
        The sum over positions of the share of equal tokens, the sum of mean cosines, and how many positions there are.
    """
    positions = prefixes.positions
    rows, hidden, valid = Branches(model.model, prefixes.cache, 1), prefixes.hidden, positions.flatten() >= 0
    match = similarity = 0.0
    for j in range(1, K + 1):
        token = model.lm_head(hidden).argmax(-1)
        hidden = rows.advance(token)
        ahead = (positions.clamp(min=0) + j).clamp(max=input_ids.shape[1] - 1)
        truth, true_hidden = input_ids.gather(1, ahead).flatten(), gather_positions(true_states, ahead).flatten(0, 1)
        match += float((token == truth)[valid].sum())
        similarity += float(cosine(hidden=hidden, truth_hidden=true_hidden)[valid].sum())
    return match / K, similarity / K, int(valid.sum())
