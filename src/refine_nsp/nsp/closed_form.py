"""Take the step without rollouts: learn what infinitely many of them would teach, in closed form (derived in docs/method.md).

With p_j = p(x_{t+j} | x_{<t+j}), which the pass over the sequence has, a rollout of K tokens matches its first j tokens with probability
P_j = p_1...p_j. J_t = (1/K) sum_j f_M(P_j), where f_M cuts the series of the logarithm after M terms: the expected `prefix_match` less 1
for M = 1, the mean log-probability of the matches for M = inf. At M = 1 this is the policy gradient with infinitely many rollouts from
every token: no sampling, no state, no baseline, no variance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.models.adapters import head_weight
from refine_nsp.nsp.context import have_far_context, local_hidden
from refine_nsp.nsp.forward import Predictions, run_and_leave
from refine_nsp.nsp.next_token import by_sequence, next_token_loss, next_tokens, target_weights
from refine_nsp.nsp.records import Batch, Metrics, StepResult, Work, masked_mean
from refine_nsp.nsp.selection import count_positions, select
from refine_nsp.ops.linear_cross_entropy import SequenceTerm, linear_next_sequence
from refine_nsp.ops.memory import part


def refine_in_closed_form(work: Work) -> StepResult:
    """Take one step without rollouts: one pass over the sequences, and one over local windows where scores are not known beforehand."""
    hidden, left = run_and_leave(work.model, work.batch, work.config)
    return replace(learn_in_closed_form(work, hidden, weigh(work, hidden)), left=left)


@dataclass(frozen=True)
class Weighing:
    """Say where the objective counts, and how much, before it is divided.

    Attributes:
        scale: [B, T], the weight of each token, or what its context score is multiplied by.
        local: [B, T, D], hidden states from local windows, of which context scores are computed; None: `scale` is the weight.
        positions: [B, P] long where positions are weighed, else None.
        count: the divisor, unless the step names another.
    """

    scale: Tensor
    local: Tensor | None
    positions: Tensor | None
    count: int


@torch.no_grad()
def weigh(work: Work, hidden: Tensor) -> Weighing:
    """Weigh selected positions alike, or every token by its context score; hidden: [B, T, D], final-norm output."""
    batch, config = work.batch, work.config
    if config.token_weights == "selected":
        detached = hidden.detach()
        positions = select(Predictions(work, detached, *next_token_loss(work.model, detached, batch)))
        chosen = hidden.new_zeros(batch.input_ids.shape).scatter_add(1, positions.clamp(min=0), (positions >= 0).to(hidden.dtype))
        return Weighing(chosen, None, positions, int(count_positions(batch.lengths, config, batch.consumed).sum()))
    # All K tokens of the continuation must be there: t + K <= length - 1.
    allowed = batch.before(batch.lengths - config.rollout_length).to(hidden.dtype)
    if batch.scores is not None:
        scores = batch.scores.to(torch.promote_types(hidden.dtype, torch.float32))
        return Weighing(allowed * scores, None, None, batch.num_targets)
    local = local_hidden(work.model, batch, config.local_window, config.local_span)
    if local is None:
        return Weighing(torch.zeros_like(allowed), None, None, batch.num_targets)
    scored = have_far_context(batch, config.local_window)
    return Weighing(allowed * scored, F.pad(local, (0, 0, allowed.shape[1] - local.shape[1], 0)), None, batch.num_targets)


@part("logits")
def learn_in_closed_form(work: Work, hidden: Tensor, weighing: Weighing) -> StepResult:
    """Compute lambda_ntp * L_ntp - lambda_rl * sum_t w_t J_t by blocks of tokens; hidden: [B, T, D], final-norm output."""
    batch, config, given = work.batch, work.config, work.learning.policy_normalizer
    divisor = max(weighing.count, 1) if given is None else by_sequence(given)
    term = SequenceTerm(
        token_weights=(weighing.scale.to(torch.promote_types(hidden.dtype, torch.float32)) / divisor).flatten(),
        K=config.rollout_length,
        order=config.order,
        local=None if weighing.local is None else weighing.local.flatten(0, 1),
        gain=config.token_weights == "context_gain",
    )
    losses, stats = linear_next_sequence(
        hidden.flatten(0, 1),
        head_weight(work.model),
        next_tokens(batch),
        target_weights(batch, work.learning.ntp_normalizer, hidden.dtype),
        term,
        config.lambda_ntp,
        config.lambda_rl,
    )
    shape = batch.input_ids.shape
    token_weights, entropy = losses.token_weights.view(shape), stats.entropy.view(shape)
    return StepResult(
        loss=losses.loss,
        loss_ntp=losses.ntp,
        loss_policy=losses.policy,
        entropy=entropy,
        metrics=_metrics(batch, entropy, token_weights, losses.matches.view(shape)),
        num_targets=batch.num_targets,
        num_rollout_tokens=weighing.count,
        positions=weighing.positions,
        token_weights=token_weights,
    )


def _metrics(batch: Batch, entropy: Tensor, token_weights: Tensor, matches: Tensor) -> Metrics:
    """Average what is logged over targets, or over tokens by their weights; all arguments [B, T]."""
    total = token_weights.sum()
    tiny = torch.finfo(token_weights.dtype).tiny
    return {
        "entropy": masked_mean(entropy, batch.target_mask),
        "entropy_at_weights": (token_weights * entropy).sum() / total.clamp(min=tiny),
        "expected_reward": (token_weights * matches).sum() / total.clamp(min=tiny),
        # Rows with nothing to weigh (a text shorter than 2W, no position) learn by next-token prediction alone.
        "sequences_without_weights": (token_weights.sum(1) <= 0).to(token_weights.dtype).mean(),
    }
