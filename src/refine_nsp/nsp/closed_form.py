"""Take the step without rollouts: learn what infinitely many of them would teach, in closed form (derived in docs/method.md).

With p_j = p(x_{t+j} | x_{<t+j}), which the pass over the sequence has, a rollout of K tokens matches its first j tokens with probability
P_j = p_1...p_j. J_t = (1/K) sum_j f_M(P_j), where f_M cuts the series of the logarithm after M terms: at M = 1 the gradient is the policy
gradient with infinitely many rollouts from every token, without sampling, state, baseline or variance.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
    positions = None
    if work.config.token_weights == "selected":
        with torch.no_grad():
            positions = select(Predictions(work, hidden, *next_token_loss(work.model, hidden, work.batch)))
    return replace(learn_in_closed_form(work, hidden, positions), left=left)


@torch.no_grad()
def weigh(work: Work, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weigh the selected positions [B, P] alike, or without any every token by its context score; hidden: [B, T, D], final-norm output.

    Returns each token's weight before it is divided, [B, T], and None; or what its context score is multiplied by, and the hidden states
    from local windows [B, T, D] that these scores are computed of.
    """
    batch, config = work.batch, work.config
    if positions is not None:
        return hidden.new_zeros(batch.input_ids.shape).scatter_add(
            1, positions.clamp(min=0), (positions >= 0).to(hidden.dtype)
        ), None
    # All K tokens of the continuation must be there: t + K <= length - 1.
    allowed = batch.before(batch.text_lengths - config.rollout_length).to(hidden.dtype)
    if batch.scores is not None:
        return allowed * batch.scores.to(torch.promote_types(hidden.dtype, torch.float32)), None
    local = local_hidden(work.model, batch, config.local_window, config.local_span)
    if local is None:
        return torch.zeros_like(allowed), None
    scored = have_far_context(batch, config.local_window)
    return allowed * scored, local


@part("logits")
def learn_in_closed_form(work: Work, hidden: Tensor, positions: Tensor | None) -> StepResult:
    """Compute lambda_ntp * L_ntp - lambda_rl * sum_t w_t J_t by blocks of tokens, for all tokens or selected positions [B, P].

    hidden: [B, T, D], final-norm output.
    """
    batch, config, given = work.batch, work.config, work.learning.policy_normalizer
    count = batch.num_text_targets
    if positions is not None:
        count = int(count_positions(batch.text_lengths, config, batch.consumed).sum())
    scale, local = weigh(work, hidden, positions)
    divisor = max(count, 1) if given is None else by_sequence(given)
    term = SequenceTerm(
        token_weights=(scale.to(torch.promote_types(hidden.dtype, torch.float32)) / divisor).flatten(),
        K=config.rollout_length,
        order=config.order,
        local=None if local is None else local.flatten(0, 1),
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
        num_rollout_tokens=count,
        positions=positions,
        token_weights=token_weights,
    )


def _metrics(batch: Batch, entropy: Tensor, token_weights: Tensor, matches: Tensor) -> Metrics:
    """Average what is logged over targets, or over tokens by their weights; all arguments [B, T]."""
    total = token_weights.sum()
    text = (batch.text_lengths > 0).to(token_weights.device, non_blocking=True)
    tiny = torch.finfo(token_weights.dtype).tiny
    return {
        "entropy": masked_mean(entropy, batch.target_mask),
        "entropy_at_weights": (token_weights * entropy).sum() / total.clamp(min=tiny),
        "expected_reward": (token_weights * matches).sum() / total.clamp(min=tiny),
        # Rows with nothing to weigh (a text shorter than 2W, no position) learn by next-token prediction alone.
        "sequences_without_weights": masked_mean((token_weights.sum(1) <= 0).to(token_weights.dtype), text),
    }
